"""Which files a checkpoint's tensors lie in: by its index, or where there is none by the files themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from safeshard.manifests.bounded import MAX_TENSORS
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import Header
from safeshard.streamer.inputs.lies_there import ADAPTER, INDEX, SINGLE, instead_of_checkpoint, shard_sets
from safeshard.streamer.inputs.names.unbuilt import unbuilt
from safeshard.streamer.sources import Source, read_json


def unindexed_files(source: Source, sizes: Mapping[str, int]) -> list[str]:
    """The files of a checkpoint without an index: one, or a whole set of numbered shards, whose headers stand in."""
    files = sorted(name for name in sizes if name.endswith(".safetensors") and name != ADAPTER)
    sets = shard_sets(files)
    if (len(files) == 1 and not sets) or (SINGLE in files and not sets):
        return [SINGLE] if SINGLE in files else files
    got, remedy = f"{len(files)} safetensors files without an index", f"add {INDEX}"
    if not files:
        got, remedy = instead_of_checkpoint(source)
    elif SINGLE in files or len(sets) > 1:
        stems = [SINGLE] * (SINGLE in files) + [f"{stem}-*-of-{count:05d}" for stem, count in sets]
        got, remedy = f"several without an index: {', '.join(stems[:5])}", "move all but one elsewhere"
    elif sets:
        ((_, count), numbered), *_ = sets.items()
        missing = next((number for number in range(1, count + 1) if number not in numbered), None)
        if missing is None and len(numbered) == count:
            return [numbered[number] for number in sorted(numbered)]
        got, remedy = f"{len(numbered)} of {count} shards without an index", "fetch the missing files"
    raise RequestError(Offence(source.spec, "", f"{SINGLE} or {INDEX}", got, remedy))


def duplicates(source: Source, headers: Mapping[str, Header]) -> Iterator[Offence]:
    seen: dict[str, str] = {}
    for file, header in sorted(headers.items()):
        for name in header.tensors:
            if name in seen:
                where, got = f"{source.spec}/{file}", f"also in {seen[name]}"
                yield Offence(where, name, "a tensor in one file", got, "remove one of them")
            seen[name] = file


def index_offences(
    source: Source, headers: Mapping[str, Header], weight_map: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[str, list[Offence]]:
    """Where an index and the headers differ: a note about tensors that no one builds, and offences of all others."""
    reason = unbuilt(config)
    where, offences, noted = f"{source.spec}/{INDEX}", [], 0
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            if reason(name):
                noted += 1
                continue
            remedy = "correct the index or fetch the file again"
            offences.append(Offence(where, name, f"to be in {file}", "not there", remedy))
    for file, header in headers.items():
        for name in sorted(header.tensors.keys() - weight_map.keys()):
            if reason(name):
                noted += 1
                continue
            got = Offence(f"{source.spec}/{file}", name, "every tensor in the index", "not listed", "correct the index")
            offences.append(got)
    note = f"{INDEX} and the files differ by {noted} tensors that transformers never builds: the files are right"
    return note if noted else "", offences


def weight_map_of(source: Source) -> dict[str, str]:
    """The index: tensor -> file."""
    index = read_json(source, INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        where = f"{source.spec}/{INDEX}"
        raise RequestError(Offence(where, "weight_map", "tensor -> file", "malformed", "correct the index"))
    if len(weight_map) > MAX_TENSORS:
        where, expected = f"{source.spec}/{INDEX}", f"at most {MAX_TENSORS} tensors"
        raise RequestError(Offence(where, "weight_map", expected, str(len(weight_map)), "check the index"))
    return weight_map


def indexed_files(source: Source, sizes: Mapping[str, int], weight_map: Mapping[str, str]) -> list[str]:
    """The files that an index names; all of them must be there, and no other checkpoint beside them."""
    where, files = f"{source.spec}/{INDEX}", sorted(set(weight_map.values()))
    offences = []
    for file in files:
        if PurePosixPath(file).name != file or "\\" in file:
            offences.append(Offence(where, file, "a file name in the same folder", "a path", "correct the index"))
        elif not file.endswith(".safetensors"):
            remedy = "convert it to safetensors; pickles are never opened"
            offences.append(Offence(where, file, "safetensors files", "another format", remedy))
        elif file not in sizes:
            offences.append(Offence(where, file, "a file in the folder", "no such file", "fetch the missing file"))
    if SINGLE in sizes and SINGLE not in files:
        got = f"both {SINGLE} and an index that does not name it"
        offences.append(Offence(source.spec, "", "one checkpoint in the folder", got, "remove one of them"))
    if offences:
        raise RequestError(offences)
    return files
