"""Where calibration data lies: a file, a file in a bucket, or one of a data set on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safeshard.manifests.bounded import TooLargeError, read_regular
from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.streamer.sources import is_url, open_source

BUILT_IN = Path(__file__).with_name("refusals.jsonl")
BUILT_IN_NAME = "built-in refusals"  # in manifests
MAX_DATA_BYTES = 256 << 20
DATA = {"safe": "calibration", "task": "task_data", "keep": "keep_data"}  # role of a Gram -> option that names its data
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
FORMS = "name a file of JSON lines, JSON, CSV or Parquet, hf://datasets/org/name, or a URL"
_DATA_SET = re.compile(
    r"hf://datasets/(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?", re.ASCII
)


@dataclass(frozen=True)
class DataFile:
    """A file of records: what the manifest calls it, its name, its bytes, and a Hub data set's commit."""

    source: str
    name: str
    data: bytes
    revision: str | None = None


def read_data(place: str | None) -> DataFile:
    """Read calibration data whole; None for the built-in requests and refusals.

    `place` is a file, `hf://datasets/org/name@revision/file` (the file may be left out where there is but one), or a
    URL of a file.

    Raises:
        RequestError: there is no such file, it cannot be read, or it is too large.
    """
    if place is None or place == BUILT_IN_NAME:
        return DataFile(BUILT_IN_NAME, BUILT_IN.name, _read(BUILT_IN, str(BUILT_IN)))
    if place.startswith("hf://"):
        return _data_set(place)
    if is_url(place):
        return _url(place)
    path = Path(place.removeprefix("file://"))
    return DataFile(str(path), path.name, _read(path, str(path)))


def pinned(place: str, revision: str | None) -> str:
    """A data set's file at its commit; other places as they are."""
    match = _DATA_SET.fullmatch(place)
    return f"hf://datasets/{match['repo']}@{revision}/{match['file']}" if match and revision else place


def _read(path: Path, shown: str) -> bytes:
    try:
        return read_regular(path, MAX_DATA_BYTES)
    except TooLargeError as error:
        raise RequestError(too_large(shown, MAX_DATA_BYTES, "bytes", error.args[1])) from None
    except OSError as error:
        got, remedy = error.strerror or str(error), FORMS
        if path.is_dir():
            found = _data_in(path)
            remedy = f"name a file in it: {', '.join(found)}" if found else "name a file"
        elif path.suffix not in SUFFIXES and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", shown, re.ASCII):
            remedy = f"for a data set on the Hub write hf://datasets/{shown}"
        elif found := _data_in(path.parent):
            remedy = f"{FORMS}; its folder has {', '.join(found)}"
        raise RequestError(Offence(shown, "--calibration", "a readable file", got, remedy)) from error


def _data_in(folder: Path) -> list[str]:
    """The first few files of records in a folder; none where there is none that can be looked into."""
    try:
        return sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)[:5]
    except OSError:
        return []


def too_large(where: str, most: int, of: str, found: int) -> Offence:
    """An offence of data that is not read whole."""
    remedy = "take a part of it: --samples are drawn at random"
    return Offence(where, "", f"at most {most} {of}", f"{found} {of}", remedy)


def _url(place: str) -> DataFile:
    folder, _, name = place.rpartition("/")
    try:
        source = open_source(folder)
        size = source.sizes().get(name)
        if size is None:
            raise RequestError(Offence(source.spec, name, "a file of records", "no such file", "check the URL"))
        if size > MAX_DATA_BYTES:
            raise RequestError(too_large(f"{source.spec}/{name}", MAX_DATA_BYTES, "bytes", size))
        return DataFile(f"{source.spec}/{name}", name, source.read(name, 0, size))
    except RunError as error:  # nothing was begun yet
        raise RequestError(Offence(error.message, remedy=error.remedy)) from error


def _data_set(place: str) -> DataFile:
    from huggingface_hub import HfApi, hf_hub_download

    match = _DATA_SET.fullmatch(place)
    if match is None:
        expected = "hf://datasets/org/name, with @revision and /file where wanted"
        raise RequestError(Offence(place, "--calibration", expected, "another form"))
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        if file is None:
            info = HfApi().dataset_info(repo, revision=revision)
            names = sorted(s.rfilename for s in info.siblings or [] if PurePosixPath(s.rfilename).suffix in SUFFIXES)
            if len(names) != 1:
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                remedy = f"name one: {place}/FILE"
                raise RequestError(Offence(place, "--calibration", "one file of records", shown or "none", remedy))
            revision, file = info.sha, names[0]
        path = Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except RequestError:
        raise
    except Exception as error:  # the network layer's errors have no common base
        remedy = "check the name, your access and the network; what is in the cache works offline (HF_HUB_OFFLINE=1)"
        got = str(error).partition("\n")[0][:200]
        raise RequestError(Offence(place, "--calibration", "a data set on the Hub", got, remedy)) from error
    commit = next((p.name for p in path.parents if p.parent.name == "snapshots"), revision)
    return DataFile(f"hf://datasets/{repo}/{file}", PurePosixPath(file).name, _read(path.resolve(), place), commit)
