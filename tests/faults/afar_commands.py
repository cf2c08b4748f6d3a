"""Commands that write to places afar, each struck at one request, run again, and compared with an undisturbed run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from afar_places import Place, Strike
from harness import NONE, SEED, Server, contents, counts, lost, scaled

PART = 3 << 10  # bytes of a part of an upload: shards go up in several
STORES = "safeshard.streamer.sources.stores.bucket"
SETTINGS = {
    STORES: {"PART": PART},
    "safeshard.streamer.write.destinations": {"PART": PART},
    "safeshard.streamer.sources.remote": {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.05},
}


@dataclass
class Afar:
    """Commands that are run one after the other, by their names, on a machine whose disk is a folder."""

    server: Server
    place: Place
    home: Path  # with `disk`, which holds the work folder and local outputs
    commands: dict[str, list[str]]
    outputs: dict[str, str]  # of each output at the place, how a command names it
    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: dict[str, list[str]] = field(default_factory=dict)  # the requests of each command, undisturbed
    wrote: list[str] = field(default_factory=list)  # the puts of the last command
    _before: dict[str, Any] = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        return self.home / "disk"

    def measure(self) -> None:
        """Run everything undisturbed, for the bytes to compare with and the requests to strike at."""
        self.earlier = self.place.outputs()
        for name in self.commands:
            self._before[name] = self.place.keep()
            shutil.copytree(self.disk, self._disk_before(name))
            strike = Strike("not done", -1, self.home / "pid")
            done = self.run(name, strike)
            assert done["status"] == 0, done["messages"]
            self.calls[name] = strike.asked
        self.whole = self.everything()
        assert self.whole
        assert set(self.outputs) <= set(self.whole), self.whole.keys()
        assert not self.place.left()

    def _disk_before(self, name: str) -> Path:
        return self.home / f"before-{name.replace(' ', '-')}"

    def reset(self, name: str) -> None:
        """Bring everything back to where it was before this command."""
        self._before[name]()
        shutil.rmtree(self.disk)
        shutil.copytree(self._disk_before(name), self.disk)

    def everything(self) -> dict[str, dict[str, Any]]:
        """What lies at the place, and the outputs on the disk; nothing is to be in the work folder in the end."""
        here = {folder.name: contents(folder) for folder in self.disk.iterdir()}
        return {**self.place.outputs(), **{f"here: {name}": files for name, files in here.items() if files}}

    def run(self, name: str, strike: Strike | None = None) -> dict[str, Any]:
        return self.say(self.commands[name], strike)

    def say(self, words: list[str], strike: Strike | None = None) -> dict[str, Any]:
        strike = strike or Strike("not done", -1, self.home / "pid")
        self.place.strike(strike)
        case = {
            "argv": words, "root": str(self.disk), "fault": NONE, "commits": False, "settings": SETTINGS,
            "pid": str(self.home / "pid"), "environment": {"SAFESHARD_WORK": str(self.disk / "work")},
        }  # fmt: skip
        try:
            return self.server.run(case)
        finally:
            self.place.settle()
            self.place.strike(None)
            self.wrote = [each for each in strike.asked if each.startswith("PUT")]

    def move(self) -> None:
        """Go on at another machine, which has nothing of this one's work folder."""
        shutil.rmtree(self.disk / "work", ignore_errors=True)

    def check_nothing_half_done(self, about: Any) -> None:
        """What looks finished at the place is: all of it, or an output that was there before."""
        for name, files in self.place.outputs().items():
            if "manifest.json" in files:
                there = {file: data for file, data in files.items() if file != "journal.jsonl"}
                unlike = _unlike(there, self.whole[name])
                assert not unlike or there == self.earlier.get(name), (about, name, unlike)

    def verify(self, about: Any) -> None:
        """The command says the same: what has no manifest is no finished output."""
        there = self.place.outputs()
        for output, url in self.outputs.items():
            verified = self.say(["verify", url])
            finished = "manifest.json" in there.get(output, ())
            assert (verified["status"] == 0) == finished, (about, output, verified["messages"])
            assert "Traceback" not in verified["messages"], (about, verified["messages"])

    def go_on(self, struck: str, about: Any) -> None:
        """Run what was struck again, and what follows it; compare every byte."""
        counts["cases"] += 1
        names = list(self.commands)
        for name in names[names.index(struck) :] if self.everything() != self.whole else ():  # struck when all was done
            done = self.run(name)
            assert done["status"] == 0, (name, about, done["messages"])
        self.compare(about)
        counts["survived"] += 1

    def compare(self, about: Any) -> None:
        got = self.everything()
        counts["bytes lost"] += sum(lost(got.get(name, {}), files) for name, files in self.whole.items())
        assert got.keys() == self.whole.keys(), (about, got.keys())
        for name, files in self.whole.items():
            assert got[name] == files, (about, name, _unlike(got[name], files))

    def spread(self, name: str, kinds: Sequence[str], cases: int) -> Iterator[tuple[int, str, random.Random]]:
        """Requests and what becomes of each, spread evenly over all there are with a random offset, each with dice."""
        dice = random.Random(f"{SEED} {name} {kinds}")
        every = [(at, kind) for at in range(len(self.calls[name])) for kind in kinds]
        number = min(len(every), scaled(cases))
        for i in range(number):
            low, high = i * len(every) // number, (i + 1) * len(every) // number
            yield *every[dice.randrange(low, max(high, low + 1))], random.Random(dice.random())


def _unlike(got: dict[str, Any], files: dict[str, Any]) -> list[str]:
    return sorted(name for name in got.keys() | files.keys() if got.get(name) != files.get(name))


def words(command: str, options: dict[str, Any]) -> list[str]:
    return [command, "--quiet", *(f"--{option.replace('_', '-')}={value}" for option, value in options.items())]


def jobs_file(file: Path, *jobs: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump({"jobs": [{k: str(v) for k, v in job.items()} for job in jobs]}))
    return file
