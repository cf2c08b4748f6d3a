"""Calibration data: records of prompts with answers, or of token ids, become token ids.

The data is JSON lines, one JSON list, CSV, or Parquet (which needs pyarrow); `records` tells
the forms of a record. Token ids are taken as they are. Text is rendered with the model's own chat template. For a
model without one it is rendered as the published Safe Delta code does: `[INST] question [/INST]`, tokenized with the
tokenizer's special tokens, then the answer's tokens alone.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.streamer.calibration.data import published as recipe
from safeshard.streamer.calibration.data.data_files import DataFile, read_data, too_large
from safeshard.streamer.calibration.data.records import FORMS, BadRecordError, BadRecords, Record, read_record
from safeshard.streamer.calibration.data.render import Renderer
from safeshard.streamer.extras import require

MAX_LIST_BYTES = 32 << 20  # of a JSON list, which is decoded as a whole
MAX_LINES = 5_000_000
MAX_LINE_BYTES = 8 << 20  # of one record: a million tokens


@dataclass(frozen=True)
class Prompts:
    """Calibration samples as token ids, and where they come from."""

    tokens: list[list[int]]  # the selected samples, in the order of the file, or of the published recipe
    file: DataFile
    blake3: str  # of the file's bytes
    count: int  # records in the file
    notes: tuple[str, ...] = ()  # what was done otherwise than the data or the options say

    @property
    def source(self) -> str:
        """Where the data comes from, as the manifest says it."""
        return self.file.source


def load_prompts(
    path: str | os.PathLike[str] | None,
    tokenizer_folder: Path,
    *,
    samples: int = 128,
    max_tokens: int = 512,
    seed: int = 0,
    fewer: bool = False,
    answers: bool = True,
    published: bool = False,
) -> Prompts:
    """Read calibration data and turn a seeded selection of it into token ids.

    Args:
        path: the data, a place that `read_data` takes; None for the built-in requests and refusals.
        tokenizer_folder: local folder of the aligned model: config.json, and the tokenizer unless all records selected
            are token ids. Code in it is never run.
        samples: how many records to take, by a permutation that depends on `seed` and their number alone.
        max_tokens: tokens of a sample beyond this many are left out.
        fewer: take all where there are fewer records than `samples`, and note it.
        answers: False takes requests without an answer as well.
        published: choose, order and render as `safeshard.streamer.calibration.data.published` says.

    Raises:
        RequestError: with the lines at fault, for data that is unreadable, malformed, empty or smaller than `samples`,
            for text that the tokenizer or its chat template refuses, for ids outside the model's vocabulary; or for a
            missing tokenizer.
    """
    for option, value in (("--samples", samples), ("--max-tokens", max_tokens)):
        if value < 1:
            raise RequestError(Offence(option, expected="at least 1", got=str(value)))
    file = read_data(os.fspath(path) if path is not None else None)
    count, last = _check_records(file, answers)
    notes = []
    if count < samples:
        if not count or not fewer:
            remedy = f"add data, or pass --samples {count}" if count else "add data"
            where = f"{file.source}:{last}"
            expected = "at least 1 sample" if fewer else f"{samples} samples"
            raise RequestError(Offence(where, "end of the data", expected, str(count), remedy))
        notes.append(f"{count} calibration samples, all there are, in place of {samples}")
    if published:
        order = recipe.order(count, seed)[:samples]
    else:
        draw = random.Random(seed)  # of its methods only random() is documented to stay the same between releases
        keys = [draw.random() for _ in range(count)]
        order = sorted(sorted(range(count), key=keys.__getitem__)[:samples])
    selected = set(order)
    found = {
        index: read_record(line, _parsed(item), answers)
        for index, (line, item) in enumerate(_items(file))
        if index in selected
    }
    records = [found[index] for index in order]
    renderer = Renderer(tokenizer_folder)
    with closing(renderer):
        tokens = _tokenize(file.source, records, tokenizer_folder, renderer, max_tokens, published)
    notes += [f"{what}, in {number} calibration samples" for what, number in renderer.notes.items()]
    return Prompts(tokens, file, hash_bytes(file.data), count, tuple(notes))


def _check_records(file: DataFile, answers: bool) -> tuple[int, int]:
    """How many records there are, and the line of the last; none is kept.

    Raises:
        RequestError: records are malformed. The first are listed, all are counted.
    """
    count, last, wrong = 0, 1, BadRecords(file.source)
    for line, item in _items(file):
        count, last = count + 1, line
        try:
            read_record(line, _parsed(item), answers)
        except BadRecordError as bad:
            wrong.add(line, bad)
    wrong.refuse(count, f"a record is JSON with {FORMS}")
    return count, last


def _items(file: DataFile) -> Iterator[tuple[int, Any]]:
    """(line, item) of the data: the bytes of a JSON line, an item of one JSON list, or a row of a table."""
    source, data = file.source, file.data.removeprefix(codecs.BOM_UTF8)
    if file.name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(source, file.data), start=1)
        return
    if file.name.endswith(".csv"):
        yield from _csv_rows(source, data)
        return
    if not data.lstrip().startswith(b"["):
        if (lines := data.count(b"\n")) > MAX_LINES:
            raise RequestError(too_large(source, MAX_LINES, "lines", lines))
        yield from ((line, content) for line, content in enumerate(io.BytesIO(data), start=1) if content.strip())
        return
    if len(data) > MAX_LIST_BYTES:
        raise RequestError(
            too_large(source, MAX_LIST_BYTES, "bytes of a JSON list; JSON lines may have more", len(data))
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(Offence(f"{source}:{line}", expected="UTF-8 text", got=error.reason)) from error
    yield from _list_items(source, text)


def _parquet_rows(source: str, data: bytes) -> Iterator[dict[str, Any]]:
    parquet = require("pyarrow.parquet", "parquet")
    try:
        for batch in parquet.ParquetFile(io.BytesIO(data)).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise RequestError(Offence(source, "", "a Parquet file", str(error)[:200])) from error


def _csv_rows(source: str, data: bytes) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(data.decode(errors="replace"), newline=""))
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None and value}
    except csv.Error as error:
        raise RequestError(Offence(f"{source}:{reader.line_num}", "", "CSV", str(error))) from error


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


def _tokenize(
    source: str, records: list[Record], folder: Path, renderer: Renderer, max_tokens: int, published: bool
) -> list[list[int]]:
    from safeshard.streamer.calibration.model.building import read_config  # with torch, which `verify` does without

    vocabulary = int(read_config(folder).get_text_config().vocab_size)
    tokens, wrong = [], BadRecords(source)
    for place, record in enumerate(records):
        try:
            if published:
                ids = renderer.render_plainly(recipe.templated(record, place))[:max_tokens]
            else:
                ids = record.ids[:max_tokens] or renderer.render(record.messages)[:max_tokens]
            if not ids or max(ids) >= vocabulary:
                raise BadRecordError(f"token ids below {vocabulary}", str(max(ids)) if ids else "no token")
            tokens.append(ids)
        except BadRecordError as bad:
            wrong.add(record.line, bad)
    wrong.refuse(len(records))
    return tokens
