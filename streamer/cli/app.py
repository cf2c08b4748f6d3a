"""The command line: each command a thin layer over the public function of its name."""

from __future__ import annotations

import ast
import atexit
import os
import sys
from collections.abc import Sequence
from copy import copy
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import find_spec

from safeshard.manifests.errors import without_secrets
from safeshard.streamer import loading
from safeshard.streamer.cli import jobs, written  # noqa: F401  # they add their commands
from safeshard.streamer.cli.command import App
from safeshard.streamer.cli.process import fail_json, guarded
from safeshard.streamer.cli.root import app
from safeshard.streamer.methods import METHODS


def _with(argv: Sequence[str]) -> App:
    """The application with the command that is asked for, or with all where it is none of them.

    To make them all takes longer than many a command. Groups that other packages register (bench, demo) are loaded
    where one is asked for, else listed.
    """
    asked = copy(app)
    asked.registered_commands = [each for each in app.registered_commands if argv and each.name == argv[0]]
    if asked.registered_commands:
        return asked
    asked.registered_commands, asked.registered_groups = [*app.registered_commands], [*app.registered_groups]
    for entry in entry_points(group="safeshard.commands"):
        if argv and argv[0] == entry.name:
            asked.add_typer(entry.load(), name=entry.name)
        elif not argv or argv[0] == "--help":
            asked.command(entry.name, help=_first_line(entry.module))(lambda: None)
    return asked


def _first_line(module: str) -> str:
    """The first line of a module's docstring, without importing it: bench would bring torch."""
    found = find_spec(module)
    source = found.loader.get_source(module) if found and isinstance(found.loader, SourceFileLoader) else None
    return (ast.get_docstring(ast.parse(source or "")) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done; 2 the request is wrong, nothing written; 1 it failed underway."""
    level, words = _apart(list(sys.argv[1:] if argv is None else argv))
    as_json = "--json" in words

    guarded(lambda: _run(_with(words), level + words, as_json), as_json=as_json, after_a_stop=_how_to_resume(words))


def _run(commands: App, arguments: list[str], as_json: bool) -> None:
    """Run the command; where stdout is for JSON, a wrong command line becomes JSON too."""
    try:
        status = commands(args=arguments, prog_name="safeshard", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # of the parser's own errors, which typer keeps to itself
            raise
        error.message = without_secrets(error.message)  # type: ignore[attr-defined]  # words that were typed, as they were
        error.show()  # type: ignore[attr-defined]
        if as_json:
            fail_json(error.format_message(), 2, "usage")
        sys.exit(2)
    sys.exit(status or 0)


def _apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`--log-level` with its value, and the other words: it belongs before the command, but may stand anywhere."""
    for index, word in enumerate(arguments):
        if word == "--":
            break
        if word == "--log-level" or word.startswith("--log-level="):
            end = index + (1 if "=" in word else 2)
            return arguments[index:end], arguments[:index] + arguments[end:]
    return [], arguments


def _how_to_resume(arguments: Sequence[str]) -> str:
    if not arguments or arguments[0] not in {*METHODS, "batch", "finish", "calibrate", "evaluate", "tune"}:
        return "nothing was kept"
    return "run the same command again to go on from here"


def entry() -> None:
    """The console script: `main`, then an end without the interpreter's last collections.

    They walk every object of torch to free what the process gives back anyway.
    """
    status: object = 0
    loading.end_at_once()
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    entry()
