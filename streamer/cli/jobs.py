"""Commands that run jobs: a method, score, calibrate, batch, finish."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from safeshard.manifests.errors import RunError, printable
from safeshard.manifests.terminal import has_colour
from safeshard.streamer import api
from safeshard.streamer.cli import messages
from safeshard.streamer.cli.command import ON_TERMINAL
from safeshard.streamer.cli.options import takes
from safeshard.streamer.cli.process import print_json
from safeshard.streamer.cli.root import Json, Plot, app, help_of, say
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions, build


def _method_command(method: str) -> None:
    def command(*, json: Json = False, **options: Any) -> None:
        _done([getattr(api, method)(**options)], options, json)

    model = METHODS[method]
    first, _, _ = (model.__doc__ or "").strip().partition("\n")  # none under python -OO
    details = f"{first} {model.paper}"
    app.command(method, help=help_of(getattr(api, method), details))(takes(model, RunOptions)(command))


for _name in METHODS:
    _method_command(_name)


@app.command("score", help=help_of(api.score, "cos(P delta, delta) of every module; writes no model."))
@takes(
    Score,
    RunOptions,
    many=frozenset({"adapter", "finetuned"}),
    without=frozenset({"dtype", "dequantize", "push", "public"}),
)
def _score(
    *,
    suggest: Annotated[bool, typer.Option("--suggest", help="suggest a threshold for each fine-tuned model")] = False,
    plot: Plot = None,
    json: Json = False,
    **options: Any,
) -> None:
    given = options | {"plot": None if plot == ON_TERMINAL else plot}
    results = api.score(**{key: value for key, value in given.items() if value is not None})
    if not options["dry_run"]:
        color = has_colour(sys.stderr if json else sys.stdout)
        if not options["quiet"]:
            say(messages.scores(results, color), json)
        if plot == ON_TERMINAL:
            say(f"\n{messages.scores_by_layer(results, color)}\n", json)
        if suggest:
            say(messages.suggestions(results), json)
    _done(results, options | {"quiet": True} if not options["dry_run"] else options, json)


@app.command("calibrate", help=help_of(api.calibrate, Calibrate.__doc__ or ""))
@takes(Calibrate, RunOptions)
def _calibrate(*, json: Json = False, **options: Any) -> None:
    made = api.calibrate(**options)
    outcome: dict[str, Any] = {"output": str(made.output), "reverted": dict(made.reverted)}
    if options["dry_run"]:
        say(messages.factors_plan(made), json)
        outcome["bytes_to_write"] = made.bytes_to_write
    elif not options["quiet"]:
        say(f"factors: {printable(made.output)}", json)
    if json:
        print_json(outcome)
    _exit_reverted(made.reverted, "no factor")


@app.command("batch", help=help_of(api.batch, "A checkpoint that jobs share is read once."))
@takes(RunOptions)
def _batch(
    jobs: Annotated[Path, typer.Argument(help="the jobs file")],
    *,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="run what can run although some jobs cannot; exit status 1")
    ] = False,
    skip_finished: Annotated[
        bool, typer.Option("--skip-finished", help="leave out jobs whose output is finished, whatever it was made of")
    ] = False,
    part: Annotated[
        str | None, typer.Option("--part", metavar="I/N", help="do the I-th of N parts, for `finish` to put together")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="local, or ray: all parts as tasks of a Ray cluster")
    ] = "local",
    parts: Annotated[
        int | None,
        typer.Option("--parts", metavar="N", help="with --engine ray: how many (default: one a GPU, or one a node)"),
    ] = None,
    json: Json = False,
    **options: Any,
) -> None:
    failures: Sequence[Any] = ()

    def note(text: str) -> None:
        if not options["quiet"]:
            say(text, json)

    try:
        results = api.batch(
            jobs, keep_going=keep_going, skip_finished=skip_finished, note=note, part=part, engine=engine, parts=parts,
            **options,
        )  # fmt: skip
    except RunError as error:
        if not hasattr(error, "failures"):
            raise
        results, failures = error.results, error.failures  # type: ignore[attr-defined]
        print(f"safeshard: {error}", file=sys.stderr)
        for job, each in failures:
            print(f"safeshard: failed: {printable(job.output)}: {each}", file=sys.stderr)
    _done(results, options, json, [messages.failure(job, each) for job, each in failures])
    if failures:
        raise typer.Exit(1)


@app.command("finish", help=help_of(api.finish, "Every part must be there: safeshard batch JOBS --part I/N."))
@takes(RunOptions)
def _finish(
    jobs: Annotated[Path, typer.Argument(help="the jobs file that the parts were given")],
    *,
    json: Json = False,
    **options: Any,
) -> None:
    results = api.finish(jobs, **options)
    if options["dry_run"]:
        say(messages.gathered(results), json)
        options |= {"quiet": True, "dry_run": False}
    _done(results, options, json)


def _done(
    results: Sequence[Any], options: dict[str, Any], as_json: bool, failures: Sequence[dict[str, Any]] = ()
) -> None:
    if options["dry_run"]:
        given = {name: options[name] for name in RunOptions.model_fields}
        run = build(RunOptions, given)
        say(messages.plan([r.plan for r in results], int(run.memory), run.resolved_device()), as_json)
    elif not options["quiet"]:
        say(messages.summary(results), as_json)
    for line in (lines := messages.warnings(results)):
        print(f"safeshard: {line}", file=sys.stderr)
    if as_json:
        print_json([*(messages.outcome(r) for r in results), *failures])
    if options["strict"] and lines:
        raise typer.Exit(1)
    _exit_reverted(
        {f"{r.job.output}: {name}": why for r in results for name, why in r.reverted.items()}, "kept aligned"
    )


def _exit_reverted(reverted: Mapping[str, str], what: str) -> None:
    """Where modules could not be treated, say which; the output is complete, the exit status 1."""
    for name, why in reverted.items():
        print(f"safeshard: {what}: {printable(name)}: {printable(why)}", file=sys.stderr)
    if reverted:
        raise typer.Exit(1)
