"""The process around a command: its streams, the signals that end it, its exit status, how a failure is said."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from safeshard.manifests.errors import RequestError, SafeshardError, printable

OUT_OF_MEMORY = re.compile(  # torch has no one type for it
    r"out of memory|not enough memory|(can't|cannot|could not|unable to|failed to) allocate|alloc_failed", re.IGNORECASE
)
PATIENCE = 2.0  # seconds until a stop that has not come to its end is explained


class _Stopped(BaseException):
    """A signal asked for the end; no Exception, so that nothing on the way takes it for an error of its own."""

    by = ""  # the signal that came, for where a library swallows the stop and fails of it later


def _stop(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
        signal.signal(each, signal.SIG_DFL)
    _Stopped.by = signal.Signals(number).name
    signal.signal(signal.SIGALRM, _explain)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    raise _Stopped(_Stopped.by)


def _explain(number: int, frame: FrameType | None) -> None:
    """A large product or factorisation cannot be cut short: say so."""
    text = f"\nsafeshard: {_Stopped.by} came: what is at work ends first; once more ends it at once\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())  # print could be in the middle of a line of the main program


def _stop_later(dropped: Any) -> None:
    """For sys.unraisablehook: a stop that came where exceptions are dropped, as in a finalizer, comes again."""
    if not isinstance(dropped.exc_value, _Stopped):
        sys.__unraisablehook__(dropped)
        return
    number = signal.Signals[str(dropped.exc_value)]
    signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def guarded(work: Callable[[], None], *, as_json: bool, after_a_stop: str) -> None:
    """Run a command to its end, and say how it ended.

    Exit status: 0 done; 2 the request is wrong, nothing written; 1 it failed underway. `after_a_stop` says what a
    person may do where a signal came.
    """
    handlers: dict[signal.Signals, Any] = {}
    _Stopped.by = ""
    hook = sys.unraisablehook
    _open_closed_streams()
    stdout = sys.stdout
    output = _Output(stdout)
    try:
        if threading.current_thread() is threading.main_thread():
            handlers = {each: signal.signal(each, _stop) for each in (signal.SIGINT, signal.SIGTERM)}
            handlers[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
            sys.unraisablehook = _stop_later
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name must not end a run that has succeeded
                stream.reconfigure(errors="replace")
        sys.stdout = output
        try:
            work()
        except SystemExit as stop:
            if not stop.code:
                output.end()
            raise
        except Exception as error:
            if _Stopped.by:
                raise _Stopped(_Stopped.by) from error
            raise
    except SafeshardError as error:
        offences = [asdict(each) for each in error.offences] if isinstance(error, RequestError) else []
        _fail(str(error), error.exit_status, as_json, "request" if offences else "run", offences)
    except (_Stopped, KeyboardInterrupt) as stopped:
        _fail(f"interrupted by {stopped or 'SIGINT'}; {after_a_stop}", 1, as_json, "interrupted")
    except OSError as error:
        _fail(printable(error), 1, as_json, "system")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        text = f"out of memory; use a smaller --memory or another --device: {printable(error)}"
        _fail(text, 1, as_json, "memory")
    finally:
        if handlers and signal.getsignal(signal.SIGALRM) is not handlers[signal.SIGALRM]:
            signal.setitimer(signal.ITIMER_REAL, 0)  # a stop that was put off finds nothing left to stop
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        with contextlib.suppress(ValueError):  # closed
            output.flush()
        sys.stdout = stdout


class _Output:
    """Standard output that ends no run: what cannot be written is dropped, and said at the end.

    Where whoever reads has read enough (`| head`), nothing is said.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = self.error or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def end(self) -> None:
        """Write out what is left; exits with status 1 where something was dropped."""
        self.flush()
        if self.error is not None:
            print(f"safeshard: standard output: {printable(self.error)}", file=sys.stderr)
            sys.exit(1)


def _fail(text: str, status: int, as_json: bool, kind: str, offences: Sequence[dict[str, str]] = ()) -> NoReturn:
    """Say why it failed, for a person on stderr and for a program on stdout, and exit."""
    print(f"safeshard: {text}", file=sys.stderr)
    if as_json:
        fail_json(text, status, kind, offences)
    sys.exit(status)


def fail_json(text: str, status: int, kind: str, offences: Sequence[dict[str, str]] = ()) -> None:
    problems = [{key: printable(value) for key, value in each.items() if value} for each in offences]
    print_json({"error": {"kind": kind, "message": text, "exit_status": status, "problems": problems}})


def print_json(value: Any) -> None:
    print(json.dumps(value))


def _open_closed_streams() -> None:
    """Let what the parent process closed lead nowhere: else the next file opened would take its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # until the process ends
