"""Messages as token ids, by the model's own chat template; nothing of a message may be lost on the way.

A template is a program. Those of LLaVA and SmolVLM go through the parts of a content, and of a plain text that leaves
nothing, without an error. So what was rendered is looked at: it must hold each turn's text, in order. Where it does
not, the content is given in parts; where that fails too, the data is refused. A template that takes no system turn is
given its text at the head of the first user's.

It is a stranger's program, so that it runs in a process of its own, with a limit of time and memory, and what comes out
may be longer than what went in by so much and no more.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.calibration.data.bounded import Bounded, LimitError, WorkError
from safeshard.streamer.calibration.data.records import BadRecordError, Messages
from safeshard.streamer.extras import require_transformers

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TEMPLATE_TEXT = 1 << 16  # characters that a template may add to a conversation: of tools and dates, some thousands
TIMES = 4  # and how often it may say what it was given, or escape it
SYSTEM_JOINED = "the text of the system turn at the head of the user's"


class Renderer:
    """Token ids of messages; the tokenizer is loaded when it is first needed.

    `notes` counts the records in which something was done otherwise than the data says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: Counter[str] = Counter()
        self._template: Bounded[Any] = Bounded(self._apply)

    @cached_property
    def _tokenizer(self) -> Any:
        where, remedy = str(self._folder), "copy the aligned model's tokenizer there, or give the data as `input_ids`"
        if not any((self._folder / name).is_file() for name in _VOCABULARY_FILES):
            raise RequestError(Offence(where, "tokenizer", "a tokenizer", "none", remedy))
        for path in sorted(self._folder.iterdir()):  # transformers opens files by name: a pipe would block it
            if not path.is_dir() and path.exists() and not path.is_file():
                raise RequestError(Offence(str(path), "", "a regular file", "a device or a pipe", "remove it"))
        auto = require_transformers().AutoTokenizer
        with suppress(ImportError):  # here, for the process that renders
            import_module("jinja2.sandbox")
        try:
            return auto.from_pretrained(self._folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # files from elsewhere fail in many ways, all of them theirs
            raise RequestError(Offence(where, "tokenizer", "one that loads", str(error)[:300], remedy)) from error

    def close(self) -> None:
        """End the process that renders."""
        self._template.close()

    def render(self, messages: Messages) -> list[int]:
        """Token ids of a conversation.

        Raises:
            BadRecordError: the template refuses the messages, or drops a part of them.
            RequestError: there is no tokenizer.
        """
        if not self._tokenizer.chat_template:
            return self.render_plainly(messages)
        joined = _without_system(messages)
        try:
            return self._encode(self._rendered(messages), special=False)
        except BadRecordError:
            if joined is None:
                raise
        ids = self._encode(self._rendered(joined), special=False)
        self.notes[SYSTEM_JOINED] += 1
        return ids

    def _rendered(self, messages: Messages) -> str:
        """The text of the template, with every turn in it."""
        lost, problem = "", ""
        in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for form in (messages, in_parts):
            try:
                text = self._template(form)
            except LimitError as error:
                expected = "one that renders a conversation in little time and memory"
                remedy = "mend the template, or give the data as `input_ids`"
                raise RequestError(Offence(str(self._folder), "chat template", expected, str(error), remedy)) from error
            except WorkError as error:
                problem = problem or str(error)[:300]
                continue
            missing = _first_missing(messages, text)
            if missing is None:
                return text
            lost = lost or f"it drops the text of turn {missing + 1}"
        raise BadRecordError("messages that the chat template takes", problem or lost)

    def _apply(self, messages: Any) -> str:
        """What the template makes of messages."""
        text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        given = sum(len(str(message["content"])) for message in messages)
        if len(text) > TIMES * given + TEMPLATE_TEXT:
            raise ValueError(f"it makes {len(text)} characters of {given}")
        return text

    def render_plainly(self, messages: Messages) -> list[int]:
        """Token ids as the published Safe Delta code makes them, without a chat template: `[INST] question [/INST]`.

        Raises:
            BadRecordError: the turns are not those of a user and an assistant.
            RequestError: there is no tokenizer.
        """
        joined = _without_system(messages)
        if joined is not None:
            self.notes[SYSTEM_JOINED] += 1
        ids: list[int] = []
        for turn, message in enumerate(joined or messages):
            if message["role"] != ("user", "assistant")[turn % 2]:
                expected = "roles `user` and `assistant` in turn, for a model without a chat template"
                raise BadRecordError(expected, f"`{message['role']}` at turn {turn + 1}")
            if message["role"] == "user":
                ids += self._encode(f"[INST] {message['content'].strip()} [/INST]", special=turn == 0)
            else:
                ids += self._encode(message["content"], special=False)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        except Exception as error:  # of a lone surrogate, which JSON can write, some raise one thing, some another
            raise BadRecordError("text that the tokenizer takes", str(error)[:300]) from error


def _without_system(messages: Messages) -> Messages | None:
    """The system's text at the head of the first user's; None where there is no such pair."""
    if len(messages) < 2 or [m["role"] for m in messages[:2]] != ["system", "user"]:
        return None
    content = f"{messages[0]['content'].strip()}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": content}, *messages[2:]]


def _first_missing(messages: Messages, text: str) -> int | None:
    """The first turn whose text does not follow in `text`. A template may leave out reasoning before an answer."""
    at = 0
    for turn, message in enumerate(messages):
        content = message["content"].rpartition("</think>")[2].strip() or message["content"].strip()
        found = text.find(content, at)
        if found < 0:
            return turn
        at = found + len(content)
    return None
