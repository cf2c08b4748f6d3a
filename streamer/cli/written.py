"""Commands that look at what was written: inspect, verify, report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from safeshard.manifests.errors import Offence, RequestError, printable
from safeshard.manifests.terminal import has_colour
from safeshard.streamer import api
from safeshard.streamer.cli import messages
from safeshard.streamer.cli.command import ON_TERMINAL, PATH
from safeshard.streamer.cli.process import print_json
from safeshard.streamer.cli.root import WRITTEN, Json, Plot, app, help_of, say
from safeshard.streamer.recheck.written import manifest_of


@app.command("inspect", help=help_of(api.inspect))
def _inspect(
    output: Annotated[str, typer.Argument(help=WRITTEN)],
    plot: Plot = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing picture")] = False,
    json: Json = False,
) -> None:
    color, width = has_colour(sys.stdout), shutil.get_terminal_size((100, 24)).columns
    file = None if plot == ON_TERMINAL else plot
    text = api.inspect(output, width=width, color=color, plot=file, overwrite=overwrite)
    if json:
        print_json(manifest_of(output).model_dump(mode="json", by_alias=True, exclude_none=True))
    else:
        print(text)
    if plot == ON_TERMINAL:
        say(messages.values_by_layer(manifest_of(output), color), json)


@app.command("verify", help=help_of(api.verify, "Says what differs from its manifest."))
def _verify(
    output: Annotated[str, typer.Argument(help=WRITTEN)],
    inputs: Annotated[bool, typer.Option("--inputs", help="also compare the inputs with what was read")] = False,
    recompute: Annotated[int, typer.Option(help="compute this many modules again, from the inputs")] = 0,
    seed: Annotated[int, typer.Option(help="of the choice of modules")] = 0,
    source: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=PLACE", help="where an input lies now, e.g. adapter=./alice")
    ] = None,
    json: Json = False,
) -> None:
    notes: list[str] = []
    findings = api.verify(
        output, inputs=inputs, recompute=recompute, seed=seed, sources=_sources(source or []), note=notes.append,
        quiet=False,
    )  # fmt: skip
    for line in (*notes, *findings):
        say(printable(line, 10_000), json)
    end = f"{len(findings)} difference{'s' * (len(findings) > 1)}" if findings else "every byte is as the manifest says"
    say(f"{printable(output)}: {end}", json)
    if json:
        print_json({"output": str(output), "differences": [str(f) for f in findings], "notes": notes})
    if findings:
        raise typer.Exit(1)


def _sources(words: Sequence[str]) -> dict[str, str]:
    pairs = {role: place for role, _, place in (word.partition("=") for word in words)}
    if len(pairs) < len(words) or not all(pairs.values()):
        raise RequestError(Offence("--source", " ".join(words), "ROLE=PLACE, once a role", "another form"))
    return pairs


@app.command("report", help=help_of(api.report, "One HTML file that needs nothing else: to read, print and pass on."))
def _report(
    outputs: Annotated[
        list[str], typer.Argument(metavar="OUT...", help=f"outputs, or folders of such: each {WRITTEN}")
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar=PATH, help="also show figures of the outputs: a folder of `evaluate`; may be repeated"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar=PATH, help="the .html file (default: OUT.report.html; of several outputs, report.html here)"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    json: Json = False,
) -> None:
    file = api.report(outputs, evaluation=evaluation or [], file=output, overwrite=overwrite)
    say(f"report: {printable(file)}", json)
    if json:
        print_json({"report": str(file)})
