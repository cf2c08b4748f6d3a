"""Prompt sets: a file of the user's, a data set of the Hub, what safeshard ships, or prompts in the suite itself.

Records of JSON lines (or one JSON list) are
    {"prompt": ...}, also under "instruction" (with "input"), "question", "goal", "Behavior" or "text"
    {"messages": [{"role": ..., "content": ...}, ...]}, asked up to the last turn that is not the assistant's
and, for utility, what is expected under "target", "answer", "output", "completion", "response" or "summary", or as the
assistant's last message. With "choices" (a list), the question is followed by them as A, B, C and so on, and a number
as the target is the index of the right one, from 0 on. A CSV file has these names as its header, or is one column
without any; of a text file every line is a prompt.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from safeshard.manifests.bounded import TooLargeError, read_regular, refuse_many
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.extras import require
from safeshard.streamer.options import Folder, Options

MAX_BYTES = 256 << 20
LISTED = 10  # of records that are wrong; a file of another kind has thousands
BUILT_IN = {"refusals": "refusals.jsonl", "borderline": "borderline.jsonl"}
ASKED = ("prompt", "instruction", "question", "goal", "Goal", "Behavior", "behavior", "text", "dialogue")
EXPECTED = ("target", "answer", "output", "completion", "response", "summary")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Message = tuple[str, str]  # role and content


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and what is expected of the answer, if anything."""

    messages: tuple[Message, ...]
    target: str = ""

    @property
    def text(self) -> str:
        """The last message: the question itself."""
        return self.messages[-1][1]


class Item(Options):
    """A prompt that stands in the suite."""

    prompt: str = Field(min_length=1)
    target: str = ""


class Prompts(Options):
    """Where prompts come from: exactly one of file, hub, built_in, items and given."""

    file: Folder | None = Field(None, description="JSON lines, a JSON list, CSV or text")
    hub: str | None = Field(None, description="a data set of the Hub, such as walledai/HarmBench")
    subset: str | None = Field(None, description="of the Hub's data set")
    split: str = Field("train", description="of the Hub's data set")
    built_in: Literal["refusals", "borderline"] | None = Field(
        None, description="the requests of safeshard's refusals, or harmless ones that sound forbidden"
    )
    items: tuple[Item, ...] | None = Field(None, description="prompts in the suite itself")
    given: bool = Field(False, description="the user names the file: --prompts")
    column: str | None = Field(None, description="the field that holds the prompt, if it is none of the usual ones")
    target: str | None = Field(None, description="the field that holds what is expected")
    template: str = Field("{}", description="the prompt stands in place of {}")
    limit: int | None = Field(None, gt=0, description="take the first so many")

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        named = [self.file, self.hub, self.built_in, self.items, self.given or None]
        if sum(source is not None for source in named) != 1:
            raise ValueError("prompts need one of file, hub, built_in, items, or given: true")
        if "{}" not in self.template:
            raise ValueError("a template needs {} where the prompt stands")
        return self

    @property
    def source(self) -> str:
        """How they are called in results."""
        subset = f"/{self.subset}" if self.subset else ""
        shown = f"{self.hub}{subset} {self.split}" if self.hub else f"built-in {self.built_in}"
        return Path(self.file).name if self.file else shown if self.hub or self.built_in else "in the suite"


def read_prompts(source: Prompts, where: str, system: str | None = None) -> list[Prompt]:
    """Read a prompt set.

    Args:
        where: how the part is called in messages.
        system: a system prompt to put first.

    Raises:
        RequestError: it cannot be read, holds no prompts, or records are malformed; all of them.
    """
    if source.items is not None:
        records: list[tuple[str, Any]] = [(where, item.model_dump()) for item in source.items]
    elif source.hub is not None:
        records = _hub(source, where)
    else:
        records = _file(_path(source, where), where)
    found: list[Prompt] = []
    offences: list[Offence] = []
    wrong = 0
    for place, record in (taken := records[: source.limit]):
        try:
            found.append(_prompt(record, source, system))
        except ValueError as error:
            wrong += 1
            if len(offences) < LISTED:
                offences.append(Offence(place, "", str(error), repr(record)[:80]))
    if wrong > len(offences):
        offences.append(Offence(where, source.source, "prompts", f"{wrong} of {len(taken)} records that are none"))
    if offences:
        raise RequestError(offences)
    if not found:
        raise RequestError(Offence(where, "prompts", "at least one prompt", f"none in {source.source}"))
    return found


def _path(source: Prompts, where: str) -> Path:
    if source.built_in is not None:
        name = BUILT_IN[source.built_in]
        if source.built_in == "refusals":
            from safeshard.streamer.calibration.data import data_files  # the calibration data

            return data_files.BUILT_IN
        return Path(__file__).parent / "data" / name
    if source.file is None:
        remedy = "--prompts FILE, or --prompts PART=FILE"
        raise RequestError(Offence(where, "prompts", "a file of yours", "none", remedy))
    return source.file


def _file(path: Path, where: str) -> list[tuple[str, Any]]:
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file" if not path.exists() else "not a regular file")
        data = read_regular(path, MAX_BYTES)
        text = data.decode("utf-8-sig")
    except TooLargeError as error:
        raise RequestError(Offence(str(path), "", f"at most {MAX_BYTES} bytes", str(error.args[1]))) from None
    except OSError as error:
        raise RequestError(Offence(where, "prompts", f"a readable file {path}", error.strerror or str(error))) from None
    except UnicodeDecodeError as error:
        raise RequestError(Offence(str(path), "", "UTF-8 text", error.reason)) from None
    try:
        if path.suffix == ".csv":
            return [(f"{path}:{line}", record) for line, record in _csv(text)]
        if path.suffix in (".json", ".jsonl"):
            refuse_many(data)
            return [(f"{path}:{line}", record) for line, record in _json(text)]
    except (ValueError, RecursionError, csv.Error) as error:
        raise RequestError(Offence(str(path), "", f"valid {path.suffix[1:].upper()}", str(error))) from None
    return [(f"{path}:{n}", {"prompt": line}) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    head = [cell.strip() for cell in rows[0]] if rows else []
    if set(head) & {*ASKED}:
        yield from ((n, dict(zip(head, row, strict=False))) for n, row in enumerate(rows[1:], 2))
    else:
        yield from ((n, {"prompt": row[0]}) for n, row in enumerate(rows, 1))


def _json(text: str) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        yield from enumerate(json.loads(text), 1)
        return
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield n, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {n}: {error}") from None


def _hub(source: Prompts, where: str) -> list[tuple[str, Any]]:
    datasets = require("datasets", "evaluate")
    try:
        rows = datasets.load_dataset(source.hub, source.subset, split=source.split)
    except Exception as error:  # it raises what the Hub, the file system and a dozen formats raise
        got = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "see that it exists, that you may read it (huggingface-cli login), and HF_HUB_OFFLINE"
        raise RequestError(Offence(where, f"hub: {source.hub}", "a data set that loads", got, remedy)) from None
    return [(f"{source.hub}:{n}", dict(row)) for n, row in enumerate(rows)]


def _prompt(record: Any, source: Prompts, system: str | None) -> Prompt:
    prompt = _read(record, source, system)
    try:
        "".join([*(text for turn in prompt.messages for text in turn), prompt.target]).encode()
    except UnicodeEncodeError:
        raise ValueError("text without lone surrogates") from None
    return prompt


def _read(record: Any, source: Prompts, system: str | None) -> Prompt:
    if not isinstance(record, Mapping):
        raise ValueError("a record of named fields")
    first: tuple[Message, ...] = (("system", system),) if system else ()
    target = _field(record, [source.target] if source.target else EXPECTED)
    if "messages" in record and source.column is None:
        turns = _turns(record["messages"])
        if turns[-1][0] == "assistant":
            target, turns = turns[-1][1], turns[:-1]
        if not turns or turns[-1][0] == "assistant":
            raise ValueError("messages that end with a question, or with one and its answer")
        return Prompt((*first, *turns), _text(target))
    asked = _field(record, [source.column] if source.column else ASKED)
    if not isinstance(asked, str) or not asked.strip():
        names = source.column or " or ".join(ASKED[:4])
        raise ValueError(f"a prompt that is not empty under {names}")
    if isinstance(extra := record.get("input"), str) and extra.strip() and source.column is None:
        asked = f"{asked}\n\n{extra}"
    if choices := record.get("choices"):
        asked, target = _with_choices(asked, choices, target)
    return Prompt((*first, ("user", source.template.replace("{}", asked))), _text(target))


def _field(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text(target: Any) -> str:
    return "" if target is None else target if isinstance(target, str) else json.dumps(target, ensure_ascii=False)


def _turns(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages with role and content")
    turns = [(m.get("role"), m.get("content")) if isinstance(m, Mapping) else (None, None) for m in messages]
    if not all(isinstance(role, str) and isinstance(content, str) and content.strip() for role, content in turns):
        raise ValueError("messages with role and content, none of them empty")
    return tuple((str(role), str(content)) for role, content in turns)


def _with_choices(asked: str, choices: Any, target: Any) -> tuple[str, str]:
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"2 to {len(LETTERS)} choices")
    if isinstance(target, int):
        if not 0 <= target < len(choices):
            raise ValueError("an answer among the choices")
        target = LETTERS[target]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([asked, *lines, "Answer with the letter alone."]), target
