"""The command line: each command a thin layer over the public function of its name."""

from __future__ import annotations

import ast
import atexit
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from safeshard.manifests.errors import Offence, RequestError, RunError, printable
from safeshard.manifests.terminal import has_colour
from safeshard.streamer import api, loading
from safeshard.streamer.cli import messages
from safeshard.streamer.cli.command import ON_TERMINAL, PATH, PLOT, App
from safeshard.streamer.cli.options import takes
from safeshard.streamer.cli.process import fail_json, guarded, print_json
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions, build
from safeshard.streamer.recheck.written import manifest_of

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


def _say(text: str, as_json: bool) -> None:
    """Prose for a person: on stdout, unless that is for JSON alone."""
    print(text, file=sys.stderr if as_json else sys.stdout)


def _help(function: Callable[..., Any], *paragraphs: str) -> str:
    """The first line of a public function, for the list of commands, and what follows where one is asked about."""
    return "\n\n".join([(function.__doc__ or "").splitlines()[0], *paragraphs])


def _method_command(method: str) -> None:
    def command(*, json: Json = False, **options: Any) -> None:
        _done([getattr(api, method)(**options)], options, json)

    model = METHODS[method]
    details = f"{(model.__doc__ or '').strip().splitlines()[0]} {model.paper}"
    app.command(method, help=_help(getattr(api, method), details))(takes(model, RunOptions)(command))


for _name in METHODS:
    _method_command(_name)


@app.command("score", help=_help(api.score, "cos(P delta, delta) of every module; writes no model."))
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
            _say(messages.scores(results, color), json)
        if plot == ON_TERMINAL:
            _say(f"\n{messages.scores_by_layer(results, color)}\n", json)
        if suggest:
            _say(messages.suggestions(results), json)
    _done(results, options | {"quiet": True} if not options["dry_run"] else options, json)


@app.command("calibrate", help=_help(api.calibrate, Calibrate.__doc__ or ""))
@takes(Calibrate, RunOptions)
def _calibrate(*, json: Json = False, **options: Any) -> None:
    made = api.calibrate(**options)
    outcome: dict[str, Any] = {"output": str(made.output), "reverted": dict(made.reverted)}
    if options["dry_run"]:
        _say(messages.factors_plan(made), json)
        outcome["bytes_to_write"] = made.bytes_to_write
    elif not options["quiet"]:
        _say(f"factors: {printable(made.output)}", json)
    if json:
        print_json(outcome)
    _exit_reverted(made.reverted, "no factor")


@app.command("batch", help=_help(api.batch, "A checkpoint that jobs share is read once."))
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
            _say(text, json)

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


@app.command("finish", help=_help(api.finish, "Every part must be there: safeshard batch JOBS --part I/N."))
@takes(RunOptions)
def _finish(
    jobs: Annotated[Path, typer.Argument(help="the jobs file that the parts were given")],
    *,
    json: Json = False,
    **options: Any,
) -> None:
    results = api.finish(jobs, **options)
    if options["dry_run"]:
        _say(messages.gathered(results), json)
        options |= {"quiet": True, "dry_run": False}
    _done(results, options, json)


@app.command("inspect", help=_help(api.inspect))
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
        _say(messages.values_by_layer(manifest_of(output), color), json)


@app.command("verify", help=_help(api.verify, "Says what differs from its manifest."))
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
        _say(printable(line, 10_000), json)
    end = f"{len(findings)} difference{'s' * (len(findings) > 1)}" if findings else "every byte is as the manifest says"
    _say(f"{printable(output)}: {end}", json)
    if json:
        print_json({"output": str(output), "differences": [str(f) for f in findings], "notes": notes})
    if findings:
        raise typer.Exit(1)


def _sources(words: Sequence[str]) -> dict[str, str]:
    pairs = {role: place for role, _, place in (word.partition("=") for word in words)}
    if len(pairs) < len(words) or not all(pairs.values()):
        raise RequestError(Offence("--source", " ".join(words), "ROLE=PLACE, once a role", "another form"))
    return pairs


@app.command("report", help=_help(api.report, "One HTML file that needs nothing else: to read, print and pass on."))
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
    _say(f"report: {printable(file)}", json)
    if json:
        print_json({"report": str(file)})


def _done(
    results: Sequence[Any], options: dict[str, Any], as_json: bool, failures: Sequence[dict[str, Any]] = ()
) -> None:
    if options["dry_run"]:
        given = {name: options[name] for name in RunOptions.model_fields}
        _say(messages.plan([r.plan for r in results], int(build(RunOptions, given).memory)), as_json)
    elif not options["quiet"]:
        _say(messages.summary(results), as_json)
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


def _mount(argv: Sequence[str]) -> None:
    """Add the command groups that other packages register (bench, demo): loaded where one is asked for, else listed."""
    for entry in entry_points(group="safeshard.commands"):
        if argv and argv[0] == entry.name:
            app.add_typer(entry.load(), name=entry.name)
        elif not argv or argv[0] == "--help":
            app.command(entry.name, help=_first_line(entry.module))(lambda: None)


def _first_line(module: str) -> str:
    """The first line of a module's docstring, without importing it: bench would bring torch."""
    found = find_spec(module)
    source = found.loader.get_source(module) if found and isinstance(found.loader, SourceFileLoader) else None
    return (ast.get_docstring(ast.parse(source or "")) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done; 2 the request is wrong, nothing written; 1 it failed underway."""
    level, words = _apart(list(sys.argv[1:] if argv is None else argv))
    as_json = "--json" in words

    def work() -> None:
        _mount(words)
        _run(level + words, as_json)

    guarded(work, as_json=as_json, after_a_stop=_how_to_resume(words))


def _run(arguments: list[str], as_json: bool) -> None:
    """Run the command; where stdout is for JSON, a wrong command line becomes JSON too."""
    if not as_json:
        app(args=arguments, prog_name="safeshard")
        return
    try:
        status = app(args=arguments, prog_name="safeshard", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # of the parser's own errors, which typer keeps to itself
            raise
        error.show()  # type: ignore[attr-defined]
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
