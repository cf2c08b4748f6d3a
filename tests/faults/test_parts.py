"""Parts of a batch that are killed, and `finish`: the others go on, and the outputs have the bytes of one machine."""

from __future__ import annotations

import shutil
import signal
from typing import Any

import pytest
from harness import counts, outputs
from part_commands import COMMANDS, Parts


@pytest.mark.parametrize("struck", COMMANDS)
def test_killed_between_any_two_calls(parts: Parts, struck: str) -> None:
    case = parts.case(struck)
    for at, dice in case.spread(case.calls, 8, f"kill {struck}"):
        case.reset()
        fault = {"kind": "kill", "at": at, "keep": dice.choice([0.0, 0.0, 0.3, 0.9])}
        died = case.run(fault)
        assert died["status"] in (-signal.SIGKILL, 0), died["messages"]
        check_nothing_half_done(parts, fault)
        go_on(parts, struck, fault)


@pytest.mark.parametrize("struck", COMMANDS)
def test_killed_again_and_again(parts: Parts, struck: str) -> None:
    case = parts.case(struck)
    for _, dice in case.spread(1000, 1, f"again {struck}"):
        case.reset()
        for _ in range(3):
            case.run({"kind": "kill", "at": dice.randrange(case.calls), "keep": dice.random()})
            check_nothing_half_done(parts, struck)
        go_on(parts, struck, "again")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signalled_at_any_time(parts: Parts, number: signal.Signals) -> None:
    case = parts.case("part")
    for _, dice in case.spread(1000, 2, f"time {number}"):
        case.reset()
        died = case.run(after=dice.uniform(0.0, 0.3), signal=number)
        assert "Traceback" not in died["messages"], died["messages"]
        go_on(parts, "part", number)


def go_on(parts: Parts, struck: str, about: Any) -> None:
    """Run what was struck again, and what follows it; compare every byte."""
    counts["cases"] += 1
    for name in COMMANDS[COMMANDS.index(struck) :]:
        done = parts.run(name)
        assert done["status"] == 0, (name, about, done["messages"])
    parts.compare(about)
    counts["survived"] += 1


def check_nothing_half_done(parts: Parts, about: Any) -> None:
    """What has its name is whole; no loader finds a model in what is underway."""
    there = outputs(parts.root)
    for name, files in there.items():
        if name in parts.whole:
            assert {n: d for n, d in files.items() if n != "journal.jsonl"} == parts.whole[name], (name, about)
        else:
            assert name.endswith((".parts", ".partial")), (name, about)
            named = [file for file in files if file.endswith(".safetensors")]
            assert not named or "manifest.json" in files, (name, about, named)


def test_finish_refuses_what_a_killed_part_left(parts: Parts) -> None:
    case = parts.case("part")
    case.reset()
    assert case.run({"kind": "kill", "at": case.calls // 2})["status"] == -signal.SIGKILL
    refused = parts.run("finish")
    assert refused["status"] == 2
    assert "1/2" in refused["messages"]
    shutil.rmtree(parts.root)
