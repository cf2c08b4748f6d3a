"""Small models."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from safeshard.bench.toy.small import make_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `small` in it, as `safeshard demo --small --folder small` leaves it; one for all workers."""
    below = tmp_path_factory.getbasetemp()
    below = below.parent if below.name.startswith("popen-") else below
    with (below / "small.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = below / "documents"
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # adapters record the place of their base
            make_small(Path("small"), print)
            (folder / "small/.safeshard-demo").touch()
    return folder
