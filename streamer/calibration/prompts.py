"""Calibration data: a file of prompts with answers, or of token ids, becomes token ids.

Records are JSON lines, or one JSON list, of
    {"instruction": ..., "output": ...}
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"input_ids": [...]}
Token ids are taken as they are. Other keys are ignored, but `input` beside `instruction` must be empty. Text is
rendered with the model's own chat template. For a model without one it is rendered as the published Safe Delta code
does: `[INST] question [/INST]`, tokenized with the tokenizer's special tokens, then the answer's tokens alone.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safeshard.manifests.bounded import TooLargeError, read_regular
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.streamer.extras import require_transformers

BUILT_IN = Path(__file__).with_name("data") / "refusals.jsonl"
BUILT_IN_NAME = "built-in refusals"  # in manifests
MAX_DATA_BYTES = 256 << 20
MAX_LIST_BYTES = 32 << 20  # of a JSON list, which is decoded as a whole
MAX_LINES = 5_000_000
MAX_LINE_BYTES = 8 << 20  # of one record: a million tokens
MAX_OFFENCES = 1000
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class _Record:
    """One record of the data: token ids, or else messages of `role` and `content`."""

    line: int
    ids: list[int]
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """Calibration samples as token ids, and where they come from."""

    tokens: list[list[int]]  # the selected samples, in the order of the file
    source: str  # the file's path, or BUILT_IN_NAME
    blake3: str  # of the file's bytes
    count: int  # records in the file


class _BadRecord(Exception):
    """What was expected of a record, and what it has instead."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got


def load_prompts(
    path: str | os.PathLike[str] | None,
    tokenizer_folder: Path,
    *,
    samples: int = 128,
    max_tokens: int = 512,
    seed: int = 0,
) -> Prompts:
    """Read calibration data and turn a seeded selection of it into token ids.

    Args:
        path: the data; None for the built-in requests and refusals.
        tokenizer_folder: local folder of the aligned model: config.json, and the tokenizer unless all records selected
            are token ids. Code in it is never run.
        samples: how many records to take, by a permutation that depends on `seed` and their number alone.
        max_tokens: tokens of a sample beyond this many are left out.

    Raises:
        RequestError: with the lines at fault, for data that is unreadable, malformed, empty or smaller than `samples`,
            for text that the tokenizer or its chat template refuses, for ids outside the model's vocabulary; or for a
            missing tokenizer.
    """
    for option, value in (("--samples", samples), ("--max-tokens", max_tokens)):
        if value < 1:
            raise RequestError(Offence(option, expected="at least 1", got=str(value)))
    if path is not None and "://" in (text := os.fspath(path)):
        remedy = "fetch it first (hf download, aws s3 cp, curl) and name the file"
        raise RequestError(Offence("--calibration", text, "a local file", "a URL", remedy))
    source = str(Path(path)) if path is not None else BUILT_IN_NAME
    data = _read(Path(path) if path is not None else BUILT_IN)
    count, last = _check_records(source, data)
    if count < samples:
        remedy = f"add data, or pass --samples {count}" if count else "add data"
        raise RequestError(Offence(f"{source}:{last}", "end of the data", f"{samples} samples", str(count), remedy))
    draw = random.Random(seed)  # of its methods only random() is documented to stay the same between releases
    keys = [draw.random() for _ in range(count)]
    selected = set(sorted(range(count), key=keys.__getitem__)[:samples])
    records = [
        _record(line, _parsed(item)) for index, (line, item) in enumerate(_items(source, data)) if index in selected
    ]
    tokens = _tokenize(source, records, tokenizer_folder, max_tokens)
    return Prompts(tokens, source, hash_bytes(data), count)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_DATA_BYTES)
    except TooLargeError as error:
        raise RequestError(_too_large(str(path), MAX_DATA_BYTES, "bytes", error.args[1])) from None
    except OSError as error:
        raise RequestError(Offence(str(path), expected="a readable file", got=error.strerror or str(error))) from error


def _too_large(where: str, most: int, of: str, found: int) -> Offence:
    remedy = "take a part of it: --samples are drawn at random"
    return Offence(where, "", f"at most {most} {of}", f"{found} {of}", remedy)


def _check_records(source: str, data: bytes) -> tuple[int, int]:
    """How many records there are, and the line of the last; none is kept.

    Raises:
        RequestError: records are malformed. The first are listed, all are counted.
    """
    count, wrong, last = 0, 0, 1
    offences: list[Offence] = []
    for line, item in _items(source, data):
        count, last = count + 1, line
        try:
            _record(line, _parsed(item))
        except _BadRecord as bad:
            wrong += 1
            if len(offences) < MAX_OFFENCES:
                offences.append(Offence(f"{source}:{line}", "", bad.expected, bad.got))
    if wrong > len(offences):
        offences.append(Offence(source, "", "records of one of these forms", f"{wrong} of {count} that are none"))
    if offences:
        raise RequestError(offences)
    return count, last


def _items(source: str, data: bytes) -> Iterator[tuple[int, Any]]:
    """(line, item) of the data: the bytes of a JSON line, or an item of one JSON list."""
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        if (lines := data.count(b"\n")) > MAX_LINES:
            raise RequestError(_too_large(source, MAX_LINES, "lines", lines))
        yield from ((line, content) for line, content in enumerate(io.BytesIO(data), start=1) if content.strip())
        return
    if len(data) > MAX_LIST_BYTES:
        raise RequestError(
            _too_large(source, MAX_LIST_BYTES, "bytes of a JSON list; JSON lines may have more", len(data))
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(Offence(f"{source}:{line}", expected="UTF-8 text", got=error.reason)) from error
    yield from _list_items(source, text)


def _parsed(item: Any) -> Any:
    """The value of an item; what is no JSON comes as the exception that says so."""
    if not isinstance(item, bytes):
        return item
    if len(item) > MAX_LINE_BYTES:
        return ValueError(f"a line of {len(item)} bytes, more than {MAX_LINE_BYTES}")
    try:
        return json.loads(item.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"no UTF-8 text: {error.reason}")
    except (ValueError, RecursionError) as error:
        return error


def _list_items(source: str, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of the items of one JSON list, one at a time."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def skip(position: int) -> int:
        return blank.match(text, position).end()  # type: ignore[union-attr]  # the pattern matches nothing at all, too

    line, counted = 1, 0
    at = skip(text.index("[") + 1)
    try:
        while text[at : at + 1] != "]" or counted:
            line, counted = line + text.count("\n", counted, at), at
            value, end = decoder.raw_decode(text, at)
            yield line, value
            at = skip(end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = skip(at + 1)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except (ValueError, RecursionError) as error:
        where = f"{source}:{getattr(error, 'lineno', 1)}"
        raise RequestError(Offence(where, "", "a JSON list, or one JSON object a line", str(error))) from error


def _record(line: int, value: Any) -> _Record:
    if not isinstance(value, dict):
        raise _BadRecord("a JSON object", str(value) if isinstance(value, Exception) else type(value).__name__)
    kinds = [key for key in ("input_ids", "messages", "instruction") if key in value]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "none of them"
        raise _BadRecord("one of `instruction` with `output`, `messages`, or `input_ids`", got)
    if kinds == ["input_ids"]:
        return _Record(line, _ids(value["input_ids"]), [])
    if kinds == ["messages"]:
        return _Record(line, [], _messages(value["messages"]))
    if value.get("input"):
        raise _BadRecord("no `input`", "an `input` beside `instruction`; join the two")
    question, answer = _text(value, "instruction"), _text(value, "output")
    return _Record(line, [], [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) != {int} or min(value) < 0:
        raise _BadRecord("`input_ids`: token ids, at least one", "something else")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise _BadRecord("`messages`: objects with `role` and `content`, at least one", "something else")
    return [{"role": _text(message, "role"), "content": _text(message, "content")} for message in value]


def _text(value: dict[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str) or not value[key].strip():
        raise _BadRecord(f"`{key}`: text that is not blank", "blank" if isinstance(value.get(key), str) else "no text")
    return str(value[key])


def _tokenize(source: str, records: list[_Record], folder: Path, max_tokens: int) -> list[list[int]]:
    from safeshard.streamer.calibration.skeleton import read_config  # with torch, which `verify` does without

    vocabulary = int(read_config(folder).get_text_config().vocab_size)
    renderer = _Renderer(folder)
    tokens, offences = [], []
    for record in records:
        try:
            ids = record.ids[:max_tokens] or renderer.render(record.messages)[:max_tokens]
            if not ids or max(ids) >= vocabulary:
                raise _BadRecord(f"token ids below {vocabulary}", str(max(ids)) if ids else "no token")
            tokens.append(ids)
        except _BadRecord as bad:
            offences.append(Offence(f"{source}:{record.line}", "", bad.expected, bad.got))
    if offences:
        raise RequestError(offences)
    return tokens


class _Renderer:
    """Token ids of messages; the tokenizer is loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Any:
        where, remedy = str(self._folder), "copy the aligned model's tokenizer there, or give the data as `input_ids`"
        if not any((self._folder / name).is_file() for name in _VOCABULARY_FILES):
            raise RequestError(Offence(where, "tokenizer", "a tokenizer", "none", remedy))
        for path in sorted(self._folder.iterdir()):  # transformers opens files by name: a pipe would block it
            if not path.is_dir() and path.exists() and not path.is_file():
                raise RequestError(Offence(str(path), "", "a regular file", "a device or a pipe", "remove it"))
        auto = require_transformers().AutoTokenizer
        try:
            return auto.from_pretrained(self._folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # files from elsewhere fail in many ways, all of them theirs
            raise RequestError(Offence(where, "tokenizer", "one that loads", str(error), remedy)) from error

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            if self._tokenizer.chat_template:
                return self._encode(self._tokenizer.apply_chat_template(messages, tokenize=False), special=False)
            return self._render_plainly(messages)
        except (RequestError, _BadRecord):
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise _BadRecord("messages that the chat template takes", str(error)) from error

    def _render_plainly(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = []
        for turn, message in enumerate(messages):
            if message["role"] != ("user", "assistant")[turn % 2]:
                expected = "roles `user` and `assistant` in turn, for a model without a chat template"
                raise _BadRecord(expected, f"`{message['role']}` at turn {turn + 1}")
            if message["role"] == "user":
                ids += self._encode(f"[INST] {message['content'].strip()} [/INST]", special=turn == 0)
            else:
                ids += self._encode(message["content"], special=False)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
