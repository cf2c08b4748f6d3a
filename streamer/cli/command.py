"""How every command reads its words: typer's parser, forgiving in form and strict in sense."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.methods import METHODS
from safeshard.streamer.options import local_path

F = TypeVar("F", bound=Callable[..., Any])
PLACE, PATH = "PLACE", "PATH"  # the metavars of options that name a model or data, or what to write
PLOT = "[FILE.svg|FILE.png]"  # the metavar of an option that draws into a file, or on the terminal without one
ON_TERMINAL = "-"


def local_folder(value: Path) -> Path:
    """A callback for a folder of this machine: a URL would become one called `s3:`."""
    return local_path("--folder", value)


class App(typer.Typer):
    """A typer application whose commands, and which itself, read their words as this file says."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        return super().command(name, cls=_Command, **settings)


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _read(self.params, ctx.info_name, args))


class _Group(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _read(self.params, ctx.info_name, args))


def _read(options: list[Any], command: str, args: list[str]) -> list[str]:
    """The words as typer takes them.

    Raises:
        RequestError: a place is given twice: the last would be taken, and nothing said of the first.
    """
    named = {name: option for option in options for name in option.opts if name.startswith("-")}
    given = [arg.partition("=")[0] for arg in args]
    twice = [name for name, option in named.items() if given.count(name) > 1 and _is_one(option)]
    if twice:
        remedy = "give it once" + "; `safeshard batch` runs many jobs in one pass" * (command in METHODS)
        raise RequestError([Offence(name, "", "one place", f"{given.count(name)} of them", remedy) for name in twice])
    alone = all(option.param_type_name == "option" for option in options)  # else a word may be an argument
    repeatable = {name for name, option in named.items() if option.multiple and alone}
    counts = {name: option.nargs for name, option in named.items() if option.nargs > 1}
    plots = {name for name, option in named.items() if option.metavar == PLOT}
    return _numbers(counts, _repeated(repeatable, _drawn(plots, args)))


def _is_one(option: Any) -> bool:
    return option.metavar in (PLACE, PATH, PLOT) and not option.multiple


def _drawn(plots: set[str], args: list[str]) -> list[str]:
    """Let an option that draws stand without a file: --plot is --plot -."""
    spread = []
    for arg, after in zip_longest(args, args[1:], fillvalue=""):
        spread += [arg, ON_TERMINAL] if arg in plots and not after.endswith((".svg", ".png", ".pdf")) else [arg]
    return spread


def _repeated(repeatable: set[str], args: list[str]) -> list[str]:
    """Let an option that may repeat take its values in one go: --adapter A B C."""
    spread: list[str] = []
    option, has_value = "", False
    for arg in args:
        if arg.startswith("-"):
            name, equals, _ = arg.partition("=")
            option, has_value = name if name in repeatable else "", bool(equals)
        elif option:
            spread += [option] * has_value
            has_value = True
        spread.append(arg)
    return spread


def _numbers(counts: dict[str, int], args: list[str]) -> list[str]:
    """Let an option of several numbers take them with commas too: --weights 0.8,0.2."""
    spread: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and name in counts:
            spread += [name, *re.split("[, ]+", value)]
        elif spread and spread[-1] in counts and arg.count(",") == counts[spread[-1]] - 1:
            spread += arg.split(",")
        else:
            spread.append(arg)
    return spread
