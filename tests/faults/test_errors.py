"""Calls that fail: full disks, failing disks, reads that come short. A clear message, and a rerun ends it."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from harness import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_fills_up(scenario: Any, name: str, late: bool) -> None:
    """At once where space can be reserved; in the middle of a write where it cannot."""
    case = scenario(name)
    total = sum(len(entry[3]) for entry in case.log if entry[0] == "write")
    for room, _ in case.spread(total, 4, f"full {late}"):
        case.reset()
        failed = case.run({"kind": "full", "bytes": room, "late": late})
        assert failed["status"] == 1, failed["messages"]
        assert "the disk is full" in failed["messages"]
        assert "run the same command again" in failed["messages"]
        assert str(case.root) in failed["messages"]
        assert "Traceback" not in failed["messages"]
        case.check_nothing_half_done(room)
        case.finish(("full", room))


@pytest.mark.parametrize("name", NAMES)
def test_any_call_that_fails(scenario: Any, name: str) -> None:
    case = scenario(name)
    for at, dice in case.spread(case.calls, 8, "errno"):
        number = dice.choice([errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EROFS])
        case.reset()
        fault = {"kind": "errno", "at": at, "errno": number}
        failed = case.run(fault)
        if not failed["status"] and failed.get("calls", at) <= at:  # how many there are depends on the threads
            continue
        assert failed["status"] == 1, (fault, failed["messages"])
        assert "again" in failed["messages"] or "elsewhere" in failed["messages"], (fault, failed["messages"])
        assert "Traceback" not in failed["messages"], failed["messages"]
        case.check_nothing_half_done(fault)
        case.finish(fault)


@pytest.mark.parametrize("name", NAMES)
def test_reads_that_come_short_or_fail(scenario: Any, name: str) -> None:
    """Short reads alone change nothing, as measuring a scenario has shown; here one of them fails besides."""
    case = scenario(name)
    for at, _ in case.spread(case.reads, 6, "read"):
        case.reset()
        fault = {"kind": "read", "at": at, "seed": at}
        failed = case.run(fault)
        if not failed["status"]:  # the pieces, and so the number of reads, depend on the threads
            continue
        assert failed["status"] in (1, 2), failed["messages"]  # 2: it was a header, before anything was written
        assert os.strerror(errno.EIO) in failed["messages"], failed["messages"]
        named = ("/in/", ".safetensors")  # a file of the inputs, or of the output, read again to be hashed
        assert any(name in failed["messages"] for name in named), failed["messages"]
        assert "Traceback" not in failed["messages"], failed["messages"]
        case.check_nothing_half_done(fault)
        case.finish(fault)
