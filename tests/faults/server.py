"""Forks one child for each case, so that torch is imported once. Reads cases as JSON lines, answers each with one.

What a child had to import is imported here too, once it has ended, so that those that follow find it there.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from shim import Shim

import safeshard.streamer.write.writer as writer
from safeshard.streamer.cli import app as cli


def serve() -> None:
    """Answer cases until the input ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command alone is struck, not what is around it in a child
    for line in sys.stdin:
        case = json.loads(line)
        report = Path(case["report"])
        report.unlink(missing_ok=True)
        gc.freeze()  # lest a child's first collection copy the pages of all that lives here
        pid = os.fork()
        if not pid:
            _run(case, report)
        if "after" in case:
            time.sleep(case["after"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, case["signal"])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = json.loads(report.read_text()) if report.is_file() else {}
        for module in answer.pop("modules", ()):
            with contextlib.suppress(ImportError):  # some are made as others are imported
                importlib.import_module(module)
        print(json.dumps(answer | {"status": status}), flush=True)


def _run(case: dict[str, Any], report: Path) -> NoReturn:
    status: Any = 70
    here = set(sys.modules)
    try:
        output = os.open(case["messages"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        shim = Shim(Path(case["root"]), case["fault"])
        if case["commits"]:
            writer.COMMIT_SECONDS = -1.0  # every record is a commit
        os.environ.update(case.get("environment", {}))
        for module, settings in case.get("settings", {}).items():
            vars(importlib.import_module(module)).update(settings)
        if "pid" in case:
            Path(case["pid"]).write_text(str(os.getpid()))
        if case["fault"]["kind"] != "none":
            shim.install()
        try:
            cli.main(case["argv"])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        modules = [name for name in sys.modules if name not in here]
        found = {"calls": shim.calls, "reads": shim.reads, "log": shim.log, "modules": modules}
        report.write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve()
