"""`python -m safeshard`, and the console script: the command line, which a person may stop while it still loads."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130  # as a shell has it of a program that SIGINT ended


def entry() -> None:
    """Import the command line, and run it.

    Until it is imported nothing was begun, so that SIGINT ends the process there and then: an exception could come out
    of any import, which may take it for a missing library. Where SIGINT is ignored (nohup), it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: _end())
    from safeshard.streamer.cli import app

    signal.signal(signal.SIGINT, before)
    try:
        app.entry()
    except KeyboardInterrupt:  # in what little stands outside of the command itself
        _end()


def _end() -> NoReturn:
    sys.stderr.write("safeshard: interrupted; nothing was begun\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    entry()
