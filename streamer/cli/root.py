"""The application that every command joins, and what they share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.cli.command import PLOT, App

app = App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Streaming safety re-alignment for fine-tuned language models.",
)
Json = Annotated[
    bool, typer.Option("--json", help="print the outcome as one line of JSON, and nothing else", show_default=False)
]
WRITTEN = "a folder that safeshard wrote, s3://, gs://, az:// or hf://org/name"
Plot = Annotated[
    str | None, typer.Option(metavar=PLOT, help="draw values by layer: on the terminal, or into a file for a paper")
]
LEVELS = ("debug", "info", "warning", "error")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"safeshard {version('safeshard')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help=f"what to log on stderr: {', '.join(LEVELS)}")
    ] = "warning",
) -> None:
    if log_level.lower() not in LEVELS:
        raise RequestError(Offence("--log-level", "", f"one of {', '.join(LEVELS)}", log_level))
    logging.basicConfig(format="safeshard: %(levelname)s: %(message)s")
    logging.getLogger("safeshard").setLevel(log_level.upper())


def say(text: str, as_json: bool) -> None:
    """Prose for a person: on stdout, unless that is for JSON alone."""
    print(text, file=sys.stderr if as_json else sys.stdout)


def help_of(function: Callable[..., Any], *paragraphs: str) -> str:
    """The first line of a public function, for the list of commands, and what follows where one is asked about."""
    return "\n\n".join([(function.__doc__ or "").partition("\n")[0], *paragraphs])
