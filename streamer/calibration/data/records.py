"""Records of calibration data, in the forms that people have, as messages of role and text, or as token ids.

| form | keys |
|---|---|
| token ids | `input_ids` |
| chat | `messages`: `role`, `content`; the content is text, or parts of which all are text |
| ShareGPT | `conversations`: `from`, `value` (or `role`, `content`) |
| Alpaca | `instruction`, `output`, and `input`, which follows the instruction on a new line; `system` |
| pairs | `prompt` (text or messages) with `completion`, `response`, `answer`, `output` or `chosen` |

Other keys are ignored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from safeshard.manifests.errors import Offence, RequestError

Messages = list[dict[str, str]]
LISTED = 3
FORMS = "`messages`, `conversations`, `instruction` with `output`, `prompt` with `completion`, or `input_ids`"
_SPEAKERS = {  # of ShareGPT's `from`
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system",
}  # fmt: skip
_ANSWERS = ("completion", "response", "answer", "output", "chosen")


@dataclass(frozen=True)
class Record:
    """One record of the data: token ids, or else messages of `role` and `content`."""

    line: int
    ids: list[int]
    messages: Messages


class BadRecordError(Exception):
    """What was expected of a record, and what it has instead."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got


class BadRecords:
    """Records that are wrong, by what was expected of them: a file of another kind has thousands, all wrong alike."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._first: dict[str, list[tuple[int, str]]] = {}
        self._count: Counter[str] = Counter()

    def add(self, line: int, bad: BadRecordError) -> None:
        """Count one, and keep it where it is among the first of its kind."""
        self._count[bad.expected] += 1
        if len(first := self._first.setdefault(bad.expected, [])) < LISTED:
            first.append((line, bad.got))

    def refuse(self, of: int, remedy: str = "") -> None:
        """Refuse a file of `of` records if any were wrong.

        Raises:
            RequestError: a line for each of few that are wrong alike, and one for many.
        """
        offences: list[Offence] = []
        for expected, first in self._first.items():
            shown = "" if FORMS in expected else remedy
            if (count := self._count[expected]) > LISTED:
                lines = ", ".join(str(line) for line, _ in first)
                what = f"{count} of {of} records (lines {lines}, ...)"
                offences.append(Offence(self.source, what, expected, first[0][1], shown))
            else:
                offences += [Offence(f"{self.source}:{line}", "", expected, got, shown) for line, got in first]
        if offences:
            raise RequestError(offences)


def read_record(line: int, value: Any, answers: bool = True) -> Record:
    """What a JSON value says, in whichever form.

    Raises:
        BadRecordError: it has none of the forms, or two of them, or lacks what its form needs.
    """
    if not isinstance(value, dict):
        raise BadRecordError("a JSON object", str(value) if isinstance(value, Exception) else type(value).__name__)
    kinds = [key for key in ("input_ids", "messages", "conversations", "instruction") if value.get(key) is not None]
    if len(kinds) > 1 or (not kinds and value.get("prompt") is None):
        raise BadRecordError(f"one of {FORMS}", " and ".join(kinds) or "none of them")
    if kinds == ["input_ids"]:
        return Record(line, _ids(value["input_ids"]), [])
    if kinds == ["messages"]:
        return Record(line, [], _messages("messages", value["messages"]))
    if kinds == ["conversations"]:
        return Record(line, [], _conversation(value["conversations"]))
    system = [{"role": "system", "content": _text(value, "system")}] if value.get("system") else []
    if not answers and all(value.get(key) is None for key in ("output", *_ANSWERS)):
        asked = _question(value) if kinds else value["prompt"]
        own = _messages("prompt", asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]
        return Record(line, [], [*system, own[0] | {"content": _text(own[0], "content")}, *own[1:]])
    if kinds == ["instruction"]:
        return Record(line, [], system + _turns(_question(value), _text(value, "output")))
    return Record(line, [], system + _pair(value))


def _question(value: dict[str, Any]) -> str:
    more = _text(value, "input") if value.get("input") else ""
    return "\n".join(filter(None, (_text(value, "instruction"), more)))


def _pair(value: dict[str, Any]) -> Messages:
    answers = [key for key in _ANSWERS if value.get(key) is not None]
    if not answers:
        raise BadRecordError(f"`prompt` with one of {', '.join(f'`{key}`' for key in _ANSWERS)}", "`prompt` alone")
    key = answers[0]
    if isinstance(value[key], list):  # messages; those of `chosen` repeat the prompt
        answer = _messages(key, value[key])
        if answer[0]["role"] != "assistant":
            return answer
    else:
        answer = [{"role": "assistant", "content": _text(value, key)}]
    if isinstance(value["prompt"], list):
        return _messages("prompt", value["prompt"]) + answer
    return [{"role": "user", "content": _text(value, "prompt")}, *answer]


def _turns(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) != {int} or min(value) < 0:
        raise BadRecordError("`input_ids`: token ids, at least one", "something else")
    return value


def _messages(key: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadRecordError(f"`{key}`: objects with `role` and `content`, at least one", "something else")
    return [{"role": _text(message, "role"), "content": _content(message)} for message in value]


def _conversation(value: Any) -> Messages:
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return _messages("conversations", value)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise BadRecordError("`conversations`: objects with `from` and `value`, at least one", "something else")
    return [{"role": _speaker(_text(turn, "from")), "content": _text(turn, "value")} for turn in value]


def _speaker(name: str) -> str:
    if name.lower() not in _SPEAKERS:
        raise BadRecordError(f"`from`: one of {', '.join(_SPEAKERS)}", f"`{name[:40]}`")
    return _SPEAKERS[name.lower()]


def _content(message: dict[str, Any]) -> str:
    """The text of a message; of one in parts, their texts line by line."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return _text(message, "content")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = str(part.get("type"))[:40] if isinstance(part, dict) else type(part).__name__
            raise BadRecordError("`content`: text, or parts of which all are text", f"a part of type `{kind}`")
    return _text({"content": "\n".join(part["text"] for part in parts)}, "content")


def _text(value: dict[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str) or not value[key].strip():
        got = "blank" if isinstance(value.get(key), str) else "no text"
        raise BadRecordError(f"`{key}`: text that is not blank", got)
    return str(value[key])
