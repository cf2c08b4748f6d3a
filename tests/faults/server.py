"""Forks one child for each case, so that torch is imported once. Reads cases as JSON lines, answers each with one."""

from __future__ import annotations

import contextlib
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
    for line in sys.stdin:
        case = json.loads(line)
        if case.get("calibrates"):
            import transformers.models.llama.modeling_llama  # noqa: F401
        report = Path(case["report"])
        report.unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            _run(case, report)
        if "after" in case:
            time.sleep(case["after"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, case["signal"])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = json.loads(report.read_text()) if report.is_file() else {}
        print(json.dumps(answer | {"status": status}), flush=True)


def _run(case: dict[str, Any], report: Path) -> NoReturn:
    status: Any = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(case["messages"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        shim = Shim(Path(case["root"]), case["fault"])
        if case["commits"]:
            writer.COMMIT_SECONDS = -1.0  # every record is a commit
        if case["fault"]["kind"] != "none":
            shim.install()
        try:
            cli.main(case["argv"])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        report.write_text(json.dumps({"calls": shim.calls, "reads": shim.reads, "log": shim.log}))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve()
