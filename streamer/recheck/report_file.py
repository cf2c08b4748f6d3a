"""The file that `report` writes: which outputs it is about, and where it may lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError, without_secrets
from safeshard.manifests.evaluation import Evaluation, load_evaluation
from safeshard.manifests.manifest_text import UNFINISHED
from safeshard.manifests.report import page
from safeshard.manifests.schema import MANIFEST_NAME, Manifest
from safeshard.streamer.disk import check_file, replace_file
from safeshard.streamer.options import local_path
from safeshard.streamer.recheck.written import manifest_of

MAX_DEPTH = 3  # of outputs below a folder: batches write to OUT/{adapter}/{method} and the like


def write_report(
    given: Sequence[Path | str],
    evaluations: Sequence[Path],
    file: str | os.PathLike[str] | None,
    overwrite: bool,
) -> Path:
    """Write a page about outputs, and about those in folders of outputs; return where it is.

    An output is a folder, or the URL of one afar.

    Raises:
        RequestError: what is no output, no evaluation or an evaluation of none of the outputs; all of it.
    """
    outputs = list(dict.fromkeys(output for place in given for output in _outputs(place)))
    if not outputs:
        raise RequestError(Offence("report", expected="an output", got="none"))
    place = local_path("--output", file) if file is not None else _beside(given)
    check_file(place, [".html"], overwrite)
    _check_outside(place, outputs)
    offences: list[Offence] = []
    seals: set[str | None] = set()

    def readable() -> Iterator[tuple[str, Manifest]]:
        for each in outputs:
            try:
                manifest = manifest_of(each)
            except RequestError as error:
                offences.extend(error.offences)
            else:
                seals.add(manifest.blake3)
                yield without_secrets(str(each)), manifest

    found: list[Evaluation] = []
    for each in evaluations:
        try:
            found.append(load_evaluation(each))
        except RequestError as error:
            offences.extend(error.offences)
    text = page(readable(), found)
    if not offences and found and not any(m.manifest_blake3 in seals for e in found for m in e.models):
        names = ", ".join(model.name for evaluation in found for model in evaluation.models)
        remedy = "they are matched by the hash of the manifest: evaluate these outputs again if they were made anew"
        offences.append(Offence("--evaluation", "", "figures of one of the outputs", f"figures of {names}", remedy))
    if offences:
        raise RequestError(offences)
    replace_file(place, text.encode())
    return place


def _outputs(place: Path | str) -> Sequence[Path | str]:
    return [place] if isinstance(place, str) else outputs_in(place)


def outputs_in(place: Path) -> list[Path]:
    """The place itself, if it is an output; else the outputs below it, in the order of their names, links left out.

    A folder without any is returned as it is, to be refused with what it lacks.
    """
    if not place.is_dir() or (place / MANIFEST_NAME).is_file():
        return [place]
    found = []
    for folder, names, files in os.walk(place):
        path = Path(folder)
        is_output = MANIFEST_NAME in files
        if is_output:
            found.append(path)
        deep = len(path.relative_to(place).parts) >= MAX_DEPTH
        names[:] = (
            []
            if is_output or deep
            else sorted(n for n in names if not n.startswith(".") and not n.endswith(UNFINISHED))
        )
    return found or [place]


def _beside(given: Sequence[Path | str]) -> Path:
    """Where the page goes if nobody says: beside the one output that is here, else into the current folder."""
    if len(given) > 1:
        return Path("report.html")
    if isinstance(given[0], str):
        return Path(f"{without_secrets(given[0]).rstrip('/').rpartition('/')[2]}.report.html")
    folder = (given[0].parent if given[0].is_file() else given[0]).absolute()
    return folder.parent / f"{folder.name}.report.html"


def _check_outside(file: Path, outputs: Sequence[Path | str]) -> None:
    """Refuse a place inside an output where `verify` would report a file that the manifest does not name."""
    place = Path(os.path.realpath(file))
    for output in (each for each in outputs if isinstance(each, Path)):
        folder = Path(os.path.realpath(output.parent if output.is_file() else output))
        if place.is_relative_to(folder) and place != folder / "report.html":
            expected, got = "a file outside of the output, or its report.html", "a file that its manifest does not name"
            raise RequestError(Offence("--output", str(file), expected, got, "choose another"))
