"""Scenarios: what is run, disturbed, run again, and compared with an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeshard.manifests.verify import verify

SCALE = float(os.environ.get("SAFESHARD_FAULTS", "1"))  # of the number of cases
SEED = int(os.environ.get("SAFESHARD_FAULTS_SEED", "0"))
counts: Counter[str] = Counter()  # cases, survived, bytes lost
NAMES = ("adapter", "shards", "batch", "overwrite", "safedelta")
NONE = {"kind": "none"}


class Server:
    """A process that forks a child for each run of the command line."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        argv, pipe = [sys.executable, str(Path(__file__).with_name("server.py"))], subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=env | environment)

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case; its exit status (-9: killed), messages, and what the shim counted."""
        messages = self.folder / "messages"
        assert self._process.stdin
        assert self._process.stdout
        case = case | {"messages": str(messages), "report": str(self.folder / "report")}
        print(json.dumps(case), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer | {"messages": messages.read_text()}

    def close(self) -> None:
        self._process.communicate()


@dataclass
class Scenario:
    """A command whose outputs lie in `root`, which starts as a copy of the folder `before`."""

    server: Server
    name: str
    argv: list[str]
    root: Path
    before: Path
    calibrates: bool = False
    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: int = 0
    reads: int = 0
    log: list[list[Any]] = field(default_factory=list)

    def measure(self) -> None:
        """Run undisturbed, for the bytes to compare with and the calls to strike at."""
        self.reset()
        self.earlier = outputs(self.root)
        done = self.run({"kind": "count"})
        assert done["status"] == 0, done["messages"]
        self.calls, self.log, self.whole = done["calls"], done["log"], outputs(self.root)
        self.reset()
        self.reads = self.run({"kind": "read"})["reads"]
        assert outputs(self.root) == self.whole, "short reads changed the output"

    def reset(self) -> None:
        """Bring the folder back to where it was before the first run."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)

    def run(self, fault: dict[str, Any] = NONE, *, commits: bool = True, **more: Any) -> dict[str, Any]:
        case = {"argv": self.argv, "root": str(self.root), "fault": fault, "commits": commits}
        return self.server.run(case | {"calibrates": self.calibrates} | more)

    def finish(self, about: Any) -> None:
        """Run again, and compare every byte; nothing else may be left."""
        counts["cases"] += 1
        if outputs(self.root) == self.whole:  # it was struck when all was done
            counts["survived"] += 1
            return
        done = self.run()
        assert done["status"] == 0, (self.name, about, done["messages"])
        self.compare(about)
        counts["survived"] += 1

    def compare(self, about: Any) -> None:
        got = outputs(self.root)
        counts["bytes lost"] += sum(lost(got.get(name, {}), files) for name, files in self.whole.items())
        assert got.keys() == self.whole.keys(), (self.name, about)
        for name, files in self.whole.items():
            assert got[name].keys() == files.keys(), (self.name, about, name)
            wrong = [file for file in files if got[name][file] != files[file]]
            how = list(unequal(got[name].get("manifest.json"), files.get("manifest.json")))
            assert not wrong, (self.name, about, name, wrong, how)

    def check_nothing_half_done(self, about: Any) -> None:
        """No folder looks finished that is not: an output is whole, and a partial one shows no model."""
        for folder in self.root.iterdir():
            if folder.name.endswith(".partial"):
                named = list(folder.glob("*.safetensors"))
                assert not named or (folder / "manifest.json").is_file(), (self.name, about, named)
                if named:  # all data is there; only names are missing
                    findings = {f.problem for f in verify(folder)} - {
                        "missing",
                        "a file that the manifest does not name",
                    }
                    assert not findings, (self.name, about, findings)
            else:
                assert verify(folder) == [], (self.name, about)
                got = contents(folder)
                got.pop("journal.jsonl", None)
                got = {name: data for name, data in got.items() if not name.startswith(".replaced/")}
                assert got in (self.whole[folder.name], self.earlier.get(folder.name)), (self.name, about)

    def spread(self, total: int, cases: int, salt: str) -> Iterator[tuple[int, random.Random]]:
        """Numbers below `total`, spread evenly with a random offset, each with dice of its own."""
        dice = random.Random(f"{SEED} {self.name} {salt}")
        number = min(total, scaled(cases))
        for i in range(number):
            low, high = i * total // number, (i + 1) * total // number
            yield dice.randrange(low, max(high, low + 1)), random.Random(dice.random())


def scaled(cases: int) -> int:
    return max(1, round(cases * SCALE))


def contents(folder: Path) -> dict[str, Any]:
    """All files below a folder, as `told` leaves them."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return told({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


def told(files: dict[str, Any]) -> dict[str, Any]:
    """The files of an output, of the manifest all but its run and its hash."""
    with contextlib.suppress(KeyError, ValueError):  # none yet, or torn
        manifest = json.loads(files["manifest.json"])
        files["manifest.json"] = {k: v for k, v in manifest.items() if k not in ("run", "blake3")}
    return files


def unequal(got: Any, expected: Any, at: str = "") -> Iterator[str]:
    """Where two manifests differ."""
    if type(got) is type(expected) and isinstance(got, dict | list) and len(got) == len(expected):
        for key in got if isinstance(got, dict) else range(len(got)):
            yield from unequal(
                got[key], expected.get(key) if isinstance(expected, dict) else expected[key], f"{at}/{key}"
            )
    elif got != expected:
        yield f"{at}: {str(got)[:300]} in place of {str(expected)[:300]}"


def outputs(root: Path) -> dict[str, dict[str, Any]]:
    return {folder.name: contents(folder) for folder in root.iterdir()}


def lost(got: dict[str, Any], expected: dict[str, Any]) -> int:
    """Bytes of files that are not what they should be."""
    total = 0
    for name, data in expected.items():
        there = got.get(name, b"")
        if isinstance(data, bytes) and there != data:
            total += sum(a != b for a, b in zip(data, there, strict=False)) + max(0, len(data) - len(there))
    return total


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
