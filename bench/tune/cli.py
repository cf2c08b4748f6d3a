"""Try many settings on one model; choose by what models answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from safeshard.bench.tune.run import DEFENDED, tune
from safeshard.manifests.errors import printable
from safeshard.manifests.terminal import has_colour
from safeshard.streamer.cli.command import App

app = App(
    invoke_without_command=True, subcommand_metavar="", context_settings={"allow_interspersed_args": True},
    help=__doc__,
)  # fmt: skip


@app.callback()
def command(
    sweep: Annotated[Path, typer.Argument(help="a YAML file: models, settings to try, suite, rule")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    memory: Annotated[str, typer.Option(help="host memory for tensors in flight")] = "2GiB",
    json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON", show_default=False)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars and no summary")] = False,
) -> None:
    """Sweep, evaluate on validation prompts, choose by the rule, confirm on test prompts, write the defended output."""
    made = tune(sweep, device=device, memory=memory, quiet=quiet)
    if json:
        print(made.to_json().replace("\n", ""))
    elif not quiet:
        print(made.text(has_colour(sys.stdout)))
        print(f"\ndefended output: {printable(made.sweep.output / DEFENDED)}; report: README.md beside it")
