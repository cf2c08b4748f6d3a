"""The command line: each command a thin layer over the public function of its name."""

from __future__ import annotations

import ast
import atexit
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from safeshard.manifests.errors import Offence, RequestError, SafeshardError, printable
from safeshard.streamer import api
from safeshard.streamer.cli import messages
from safeshard.streamer.cli.options import Variadic, takes
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions, build

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Streaming safety re-alignment for fine-tuned language models.",
)
OUT_OF_MEMORY = re.compile(  # torch has no one type for it
    r"out of memory|not enough memory|(can't|cannot|could not|unable to|failed to) allocate|alloc_failed", re.IGNORECASE
)
Json = Annotated[
    bool, typer.Option("--json", help="print the outcome as one line of JSON at the end", show_default=False)
]


class _Stopped(BaseException):
    """A signal asked for the end; no Exception, so that nothing on the way takes it for an error of its own."""


def _stop(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
        signal.signal(each, signal.SIG_DFL)
    raise _Stopped(signal.Signals(number).name)


def _stop_later(dropped: Any) -> None:
    """For sys.unraisablehook: a stop that came where exceptions are dropped, as in a finalizer, comes again."""
    if not isinstance(dropped.exc_value, _Stopped):
        sys.__unraisablehook__(dropped)
        return
    number = signal.Signals[str(dropped.exc_value)]
    signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"safeshard {version('safeshard')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


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


@app.command("score", cls=Variadic, help=_help(api.score, "cos(P delta, delta) of every module; writes no model."))
@takes(Score, RunOptions, many=frozenset({"adapter", "finetuned"}), without=frozenset({"dtype"}))
def _score(*, json: Json = False, **options: Any) -> None:
    results = api.score(**{key: value for key, value in options.items() if value is not None})
    if not options["quiet"] and not options["dry_run"]:
        print(messages.scores(results))
    _done(results, options | {"quiet": True} if not options["dry_run"] else options, json)


@app.command("calibrate", help=_help(api.calibrate, Calibrate.__doc__ or ""))
@takes(Calibrate, RunOptions)
def _calibrate(*, json: Json = False, **options: Any) -> None:
    made = api.calibrate(**options)
    outcome: dict[str, Any] = {"output": str(made.output), "reverted": dict(made.reverted)}
    if options["dry_run"]:
        print(messages.factors_plan(made))
        outcome["bytes_to_write"] = made.bytes_to_write
    elif not options["quiet"]:
        print(f"factors: {printable(made.output)}")
    if json:
        _print_json(outcome)
    _exit_reverted(made.reverted, "no factor")


@app.command("batch", help=_help(api.batch, "A checkpoint that jobs share is read once."))
@takes(RunOptions)
def _batch(jobs: Annotated[Path, typer.Argument(help="the jobs file")], *, json: Json = False, **options: Any) -> None:
    _done(api.batch(jobs, **options), options, json)


@app.command("inspect", help=_help(api.inspect))
def _inspect(output: Annotated[Path, typer.Argument(help="a folder that safeshard wrote")]) -> None:
    print(api.inspect(output, width=shutil.get_terminal_size((100, 24)).columns, color=sys.stdout.isatty()))


@app.command("verify", help=_help(api.verify, "Says what differs from its manifest."))
def _verify(
    output: Annotated[Path, typer.Argument(help="a folder that safeshard wrote")],
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
        output, inputs=inputs, recompute=recompute, seed=seed, sources=_sources(source or []), note=notes.append
    )
    for line in (*notes, *findings):
        print(printable(line, 10_000))
    print(f"{output}: {len(findings)} differences" if findings else f"{output}: every byte is as the manifest says")
    if json:
        _print_json({"output": str(output), "differences": [str(f) for f in findings], "notes": notes})
    if findings:
        raise typer.Exit(1)


def _sources(words: Sequence[str]) -> dict[str, str]:
    pairs = {role: place for role, _, place in (word.partition("=") for word in words)}
    if len(pairs) < len(words) or not all(pairs.values()):
        raise RequestError(Offence("--source", " ".join(words), "ROLE=PLACE, once a role", "another form"))
    return pairs


@app.command("report", help=_help(api.report, "One HTML file that needs nothing else: to read, print and pass on."))
def _report(
    outputs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="folders that safeshard wrote")],
    output: Annotated[
        Path | None,
        typer.Option(help="the .html file (default: OUT.report.html; of several outputs, report.html here)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    json: Json = False,
) -> None:
    file = api.report(outputs, file=output, overwrite=overwrite)
    print(f"report: {printable(file)}")
    if json:
        _print_json({"report": str(file)})


def _done(results: Sequence[Any], options: dict[str, Any], as_json: bool) -> None:
    if options["dry_run"]:
        given = {name: options[name] for name in RunOptions.model_fields}
        print(messages.plan([r.plan for r in results], int(build(RunOptions, given).memory)))
    elif not options["quiet"]:
        print(messages.summary(results))
    for line in (lines := messages.warnings(results)):
        print(f"safeshard: {line}", file=sys.stderr)
    if as_json:
        _print_json([messages.outcome(r) for r in results])
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


def _print_json(value: Any) -> None:
    print(json.dumps(value))


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
    arguments = list(sys.argv[1:] if argv is None else argv)
    handlers: dict[signal.Signals, Any] = {}
    hook = sys.unraisablehook
    _open_closed_streams()
    stdout = sys.stdout
    output = _Output(stdout)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name must not end a run that has succeeded
            stream.reconfigure(errors="replace")
    try:
        if threading.current_thread() is threading.main_thread():
            handlers = {each: signal.signal(each, _stop) for each in (signal.SIGINT, signal.SIGTERM)}
            handlers[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
            sys.unraisablehook = _stop_later
        _mount(arguments)
        sys.stdout = output
        try:
            app(args=arguments, prog_name="safeshard")
        except SystemExit as stop:
            if not stop.code:
                output.end()
            raise
    except SafeshardError as error:
        print(f"safeshard: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (_Stopped, KeyboardInterrupt) as stopped:
        print(f"safeshard: interrupted by {stopped or 'SIGINT'}; {_how_to_resume(arguments)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"safeshard: {printable(error)}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        print(
            f"safeshard: out of memory; use a smaller --memory or another --device: {printable(error)}", file=sys.stderr
        )
        sys.exit(1)
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


def _open_closed_streams() -> None:
    """Let what the parent process closed lead nowhere: else the next file opened would take its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # until the process ends


def _how_to_resume(arguments: Sequence[str]) -> str:
    if not arguments or arguments[0] not in {*METHODS, "batch", "calibrate", "evaluate", "tune"}:
        return "nothing was kept"
    return "run the same command again to go on from here"


def entry() -> None:
    """The console script: `main`, then an end without the interpreter's last collections.

    They walk every object of torch to free what the process gives back anyway.
    """
    status: object = 0
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
