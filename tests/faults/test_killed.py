"""Processes that are killed, at any call or any time, and power that is cut: a rerun ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
from typing import Any

import pytest
from disk import Disk
from harness import NAMES, counts, outputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("commits", [True, False])
def test_killed_between_any_two_calls(scenario: Any, name: str, commits: bool) -> None:
    case = scenario(name)
    for at, dice in case.spread(case.calls, 16 if commits else 5, f"kill {commits}"):
        case.reset()
        fault = {"kind": "kill", "at": at, "keep": dice.choice([0.0, 0.0, 0.3, 0.9])}
        died = case.run(fault, commits=commits)
        assert died["status"] in (-signal.SIGKILL, 0), died["messages"]  # fewer calls without the commits
        case.check_nothing_half_done(fault)
        if died["status"]:
            case.finish(fault)


@pytest.mark.parametrize("name", NAMES)
def test_killed_in_the_last_calls(scenario: Any, name: str) -> None:
    """Where manifests and names come into place: every call of the end."""
    case = scenario(name)
    for at, _ in case.spread(min(case.calls, 40), 10, "end"):
        case.reset()
        fault = {"kind": "kill", "at": case.calls - 1 - at}
        died = case.run(fault)
        assert died["status"] in (-signal.SIGKILL, 0)
        case.check_nothing_half_done(fault)
        if died["status"]:
            case.finish(fault)


@pytest.mark.parametrize("name", NAMES)
def test_killed_again_and_again(scenario: Any, name: str) -> None:
    case = scenario(name)
    for _, dice in case.spread(1000, 2, "again"):
        case.reset()
        struck = []
        for _ in range(4):
            struck.append(dice.randrange(case.calls))
            died = case.run({"kind": "kill", "at": struck[-1], "keep": dice.random()})
            case.check_nothing_half_done(struck)
            if not died["status"]:
                break
        if died["status"]:
            case.finish(struck)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signalled_at_any_time(scenario: Any, name: str, number: signal.Signals) -> None:
    case = scenario(name)
    for _, dice in case.spread(1000, 3, f"time {number}"):
        case.reset()
        after = dice.uniform(0.0, 0.3)
        died = case.run(after=after, signal=number)
        case.check_nothing_half_done(after)
        assert "Traceback" not in died["messages"], died["messages"]
        if died["status"] == 1:
            assert "run the same command again" in died["messages"]
        if died["status"]:
            case.finish((number, after))


MODES = ("lost", "names", "mixed")


@pytest.mark.parametrize("name", NAMES)
def test_power_cut(scenario: Any, name: str) -> None:
    case = scenario(name)
    for at, dice in case.spread(len(case.log) + 1, 10, "power"):
        mode = dice.choice(MODES)
        cut_power(case, at, mode, dice)
        if outputs(case.root) != case.whole:
            case.finish((mode, at))


@pytest.mark.parametrize("name", NAMES)
def test_power_cut_leaves_nothing_half_done(scenario: Any, name: str) -> None:
    """After any of the last calls, in which names come into place; what is left is looked at, and rarely run again."""
    case = scenario(name)
    for back, dice in case.spread(min(len(case.log), 90), 90, "last power"):
        for mode in MODES:
            counts["cases"] += 1
            cut_power(case, len(case.log) - back, mode, dice)
            counts["survived"] += 1
            if outputs(case.root) != case.whole and dice.random() < 0.03:
                case.finish((mode, back))


def cut_power(case: Any, at: int, mode: str, dice: random.Random) -> None:
    """Make the folder what a power cut may leave after the first `at` calls of an undisturbed run."""
    case.reset()
    disk = Disk(case.root)
    for entry in case.log[:at]:
        disk.apply(entry)
    shutil.rmtree(case.root)
    case.root.mkdir()
    disk.cut_power(mode, dice)
    case.check_nothing_half_done((mode, at))


@pytest.mark.parametrize("name", NAMES)
def test_the_log_shows_all_that_changes(scenario: Any, name: str) -> None:
    """What the power cuts are made from ends as the real folder did."""
    case = scenario(name)
    case.reset()
    disk = Disk(case.root)
    for entry in case.log:
        disk.apply(entry)
    folders = {f"{out}/{file}": data for out, files in case.whole.items() for file, data in files.items()}
    tree = disk.tree()
    assert tree.keys() == folders.keys()
    assert all(tree[path] == data for path, data in folders.items() if isinstance(data, bytes))
