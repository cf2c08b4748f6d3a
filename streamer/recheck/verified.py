"""Everything that `verify` looks at: the output's bytes, its inputs, and modules computed again from these."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.verify import Finding, verify
from safeshard.streamer.options import written_place
from safeshard.streamer.progress import Progress
from safeshard.streamer.recheck.written import manifest_of


def verified(
    output: str | os.PathLike[str],
    *,
    inputs: bool,
    recompute: int,
    seed: int,
    sources: Mapping[str, str],
    note: Callable[[str], None],
    quiet: bool,
) -> list[Finding]:
    """What differs from the manifest; see `safeshard.verify`."""
    findings = _bytes_of(output, quiet)
    if not inputs and not recompute:
        return findings
    try:
        manifest = manifest_of(output)
    except RequestError:  # a manifest that cannot be read is among the findings
        return findings
    from safeshard.streamer.recheck.inputs import check_inputs, input_places

    places = input_places(manifest, sources)
    changed = check_inputs(manifest, places, note)
    if not recompute:
        return [*findings, *changed]
    if changed:
        remedy = "restore the input, or name it: --source ROLE=PLACE"
        raise RequestError([Offence(f.file, f.problem, f.expected, f.got, remedy) for f in changed])
    from safeshard.streamer.recheck.recompute import recompute as recompute_modules  # it needs torch

    return [*findings, *recompute_modules(manifest, places, recompute, seed, note)]


def _bytes_of(output: str | os.PathLike[str], quiet: bool) -> list[Finding]:
    """Every file of the output, hashed again."""
    place = written_place(output)
    if isinstance(place, Path):
        with Progress(_folder_bytes(place), quiet) as bar:
            return verify(place, progress=lambda count: bar.done("hashing", count))
    from safeshard.streamer.recheck.afar import THREADS, Afar

    there = Afar(place)
    with Progress(there.nbytes, quiet) as bar:
        return verify(there, threads=THREADS, progress=lambda count: bar.done("hashing", count))


def _folder_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except OSError:  # which verifying says better
        return 0
