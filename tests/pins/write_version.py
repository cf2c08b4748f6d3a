"""Keep what this version writes, for later versions to read.

    python tests/pins/write_version.py

writes `written/VERSION`: inputs, finished outputs, saved factors, and runs that failed underway. It is run once for a
version, at the commit that is released, and never again: what users have on their disks does not change either.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pinned_inputs import write_inputs
from pinned_jobs import DATA, DELTA, MERGE, PROJECT, full_disk

from safeshard import streamer
from safeshard.manifests.errors import RunError

WRITTEN = Path(__file__).with_name("written")
INPUTS = ("aligned", "unaligned", "finetuned", "adapter", "safe-adapter", "data.jsonl")
MODIFIED = 1_700_000_000  # seconds; journals hold the times of the inputs, which copies get again

REQUESTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "merge": ("safemerge", MERGE),
    "project": ("safelora", PROJECT | {"num_layers": 6}),
    "factors": ("calibrate", DATA | {"aligned": "aligned"}),
    "delta": ("safedelta", DELTA | {"factors": "factors"}),
}
UNFINISHED = {"merge": 20, "project": 12, "factors": 3}  # name -> the write that failed


def call(function: str, options: Mapping[str, Any], output: str | Path, **more: Any) -> Any:
    """Run a request of requests.json, in the folder where its inputs lie."""
    return getattr(streamer, function)(**options, output=output, device="cpu", quiet=True, **more)


def settle_times(folder: Path) -> None:
    """Give all inputs the time that the journals name."""
    for path in [p for name in INPUTS for p in [folder / name, *(folder / name).rglob("*")]]:
        os.utime(path, (MODIFIED, MODIFIED))


def main() -> None:
    target = WRITTEN / version("safeshard")
    target.mkdir(parents=True)  # there once
    torch.set_num_threads(1)
    socket.gethostname = lambda: "host"  # which journals name
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        settle_times(folder)
        os.chdir(folder)
        for output, (function, options) in REQUESTS.items():
            if output in UNFINISHED:
                with suppress(RunError), full_disk(UNFINISHED[output]):
                    call(function, options, output)
                shutil.move(f"{output}.partial", target / "unfinished" / output)
            call(function, options, output)
            shutil.copytree(output, target / "outputs" / output)
        for source in INPUTS:
            path, copy = Path(source), target / "inputs" / source
            copy.parent.mkdir(exist_ok=True)
            shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
        os.chdir("/")
    (target / "requests.json").write_text(json.dumps(REQUESTS, indent=1) + "\n")


if __name__ == "__main__":
    main()
