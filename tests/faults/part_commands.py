"""A batch in two parts, of which one command is struck."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Scenario, Server, lost, outputs

COMMANDS = ("part", "other part", "finish")  # in the order in which they are run


@dataclass
class Parts:
    """The commands of a batch in parts; `whole` is what one machine makes of it."""

    server: Server
    home: Path
    jobs: Path
    root: Path
    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    _cases: dict[str, Scenario] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._run(["batch", str(self.jobs), "--quiet"])
        self.whole = outputs(self.root)
        shutil.rmtree(self.root)

    def words(self, name: str) -> list[str]:
        if name == "finish":
            return ["finish", str(self.jobs), "--quiet"]
        return ["batch", str(self.jobs), "--quiet", "--part", "1/2" if name == "part" else "2/2"]

    def run(self, name: str) -> dict[str, Any]:
        return self.server.run(
            {"argv": self.words(name), "root": str(self.root), "fault": {"kind": "none"}, "commits": False}
        )

    def _run(self, argv: list[str]) -> None:
        done = self.server.run({"argv": argv, "root": str(self.root), "fault": {"kind": "none"}, "commits": False})
        assert done["status"] == 0, done["messages"]

    def case(self, struck: str) -> Scenario:
        """The scenario of one command, which starts where the commands before it have ended."""
        if struck not in self._cases:
            before = self.home / struck.replace(" ", "-")
            shutil.rmtree(self.root, ignore_errors=True)
            self.root.mkdir()
            for name in COMMANDS[: COMMANDS.index(struck)]:
                self._run(self.words(name))
            shutil.copytree(self.root, before)
            made = self._cases[struck] = Scenario(self.server, struck, self.words(struck), self.root, before)
            made.reset()
            done = made.run({"kind": "count"})
            assert done["status"] == 0, done["messages"]
            made.calls = done["calls"]
        return self._cases[struck]

    def compare(self, about: Any) -> None:
        got = outputs(self.root)
        assert not sum(lost(got.get(name, {}), files) for name, files in self.whole.items()), about
        assert got == self.whole, about
