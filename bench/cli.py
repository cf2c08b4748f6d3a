"""Make synthetic models and measure; rows go to bench/results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from safeshard.bench import durability, kernels, parts, peers, pipeline, remote, rows
from safeshard.bench.inputs import models, support_planned
from safeshard.bench.machine import io, roofline
from safeshard.bench.pages import documents, pictures
from safeshard.bench.real import experiment as real
from safeshard.bench.real import pictures as real_pictures
from safeshard.bench.real import table as real_table
from safeshard.bench.toy import experiment, table
from safeshard.bench.toy import pictures as toy_pictures
from safeshard.bench.toy.defences import WHOLE
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.cli.command import PATH, App, local_folder


def _known_shape(name: str | None) -> str | None:
    if name is not None and name not in models.SHAPES:
        raise RequestError(Offence("--shape", "", " or ".join(models.SHAPES), name))
    return name


app = App(no_args_is_help=True, help=__doc__)
Folder = Annotated[
    Path,
    typer.Option(
        "--folder", metavar=PATH, callback=local_folder, help="where the models lie; they are made once and kept"
    ),
]
Kept = Annotated[
    Path,
    typer.Option("--folder", metavar=PATH, callback=local_folder, help="where models and outputs go, and are kept"),
]
Shape = Annotated[str, typer.Option("--shape", help=" or ".join(models.SHAPES), callback=_known_shape)]
KernelShape = Annotated[
    str | None,
    typer.Option(
        "--shape", help=" or ".join(models.SHAPES) + "; default: llama-8b, on a GPU llama-70b", callback=_known_shape
    ),
]
Layers = Annotated[
    int | None, typer.Option("--layers", help="decoder layers, fewer than the shape's own to save time", min=1)
]
Repeat = Annotated[
    int | None,
    typer.Option(
        "--repeat",
        help="make this many layers and repeat them: the others share their data on the disk, if it can (XFS, btrfs)",
        min=1,
    ),
]
Runs = Annotated[int, typer.Option("--runs", help="repetitions; the median counts", min=1)]
Cold = Annotated[bool, typer.Option("--cold", help="drop the files from the page cache first")]


@app.command("make-models")
def make_models(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Layers = None,
    repeat: Repeat = None,
    adapters: Annotated[int, typer.Option(help="fine-tuned adapters", min=1)] = 1,
    rank: Annotated[int, typer.Option(help="of the adapters", min=1)] = 16,
    full: Annotated[bool, typer.Option("--full", help="also full fine-tuned and safe checkpoints")] = False,
) -> None:
    """Write aligned, unaligned, safe and adapter-N folders: random weights of a real shape.

    They lie in a folder of their own, named by shape and layers. Other commands make what they need.
    """
    sizes = {"adapters": adapters, "rank": rank}
    _, paths = models.prepare(folder, shape, layers, repeat=repeat, finetuned=full, **sizes)
    print("\n".join(map(str, paths.values())))


@app.callback()
def bench(
    results: Annotated[
        Path | None,
        typer.Option(
            metavar=PATH, help="where rows go (default: bench/results in a checkout, else bench-results here)"
        ),
    ] = None,
) -> None:
    """Make synthetic models and measure."""
    if results is not None:
        rows.RESULTS = results


@app.command("kernels")
def measure_kernels(
    operations: Annotated[str, typer.Option(help="some of these")] = ",".join(kernels.OPERATIONS),
    shape: KernelShape = None,
    ranks: Annotated[str, typer.Option(help="of the adapters; default: 8,16,64, on a GPU 16")] = "",
    adapters: Annotated[str, typer.Option(help="numbers of adapters; default: 1,16,256, on a GPU 1,16,64")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda:N")] = "cpu",
    limit: Annotated[
        float | None, typer.Option(help="seconds a run may be expected to take; default: 10, on a GPU 1", min=0)
    ] = None,
    card: Annotated[str, typer.Option(help="a GPU's name: print its static roofline, and measure nothing")] = "",
) -> None:
    """Time kernels on torch and Triton against the published formulation and the machine's ceilings.

    With --device cuda:N all that is to be known of a card goes to one new file in the current folder.
    """
    gpu = bool(card) or torch.device(device).type == "cuda"
    names = _names("--operations", operations, kernels.OPERATIONS)
    shape = shape or ("llama-70b" if gpu else "llama-8b")
    sizes = (
        _numbers("--ranks", ranks or ("16" if gpu else "8,16,64")),
        _numbers("--adapters", adapters or ("1,16,64" if gpu else "1,16,256")),
    )
    if card:
        if (known := roofline.find(card)) is None:
            raise typer.BadParameter(f"none of {', '.join(c.name for c in roofline.CARDS)}", param_hint="--card")
        kernels.print_roofline(names, shape, *sizes, known)
        return
    if gpu and (count := torch.cuda.device_count()) <= (torch.device(device).index or 0):
        raise typer.BadParameter(f"torch {torch.__version__} sees {count} of them", param_hint=f"--device {device}")
    file = "kernels"
    if gpu and rows.RESULTS == rows.DEFAULT_RESULTS:
        rows.RESULTS = Path.cwd()
        file += "-" + re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    failed = kernels.run(names, shape, *sizes, device, limit if limit is not None else 1.0 if gpu else 10.0, file)
    if gpu:
        print(f"All rows are in {rows.RESULTS / file}.csv: to report this card, send this file.")
    if failed:
        print(f"{len(failed)} failed, which the report of a card should say too: {'; '.join(failed)}")
        raise typer.Exit(1)


@app.command("pipeline")
def measure_pipeline(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Annotated[str, typer.Option(help="numbers of decoder layers, a model each; default: the shape's own")] = "",
    repeat: Repeat = None,
    adapters: Annotated[str, typer.Option(help="numbers of adapters in a batch")] = "1,8,64",
    jobs: Annotated[str, typer.Option(help="some of " + ", ".join(pipeline.JOBS))] = "safemerge",
    runs: Runs = 3,
    cold: Cold = False,
    memory: Annotated[str, typer.Option(help="the jobs' --memory")] = "2GiB",
) -> None:
    """Time whole jobs from outside, with stages and peak memory, against a process that reads the same bytes."""
    depths = _numbers("--layers", layers) if layers else [None]
    counts, names = _numbers("--adapters", adapters), _names("--jobs", jobs, pipeline.JOBS)
    pipeline.run(folder, shape, depths, repeat, counts, names, runs, cold, memory)


@app.command("parts")
def measure_parts(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Layers = None,
    repeat: Repeat = None,
    count: Annotated[int, typer.Option("--parts", help="how many", min=2)] = 4,
    runs: Runs = 3,
) -> None:
    """Add up the processor's seconds of a batch in parts, beside those of one process."""
    parts.run(folder, shape, layers, repeat, count, runs)


@app.command("remote")
def measure_remote(
    folder: Folder = Path("bench-models"), shape: Shape = "llama-1b", layers: Layers = 4, runs: Runs = 3
) -> None:
    """Time reading from a server on this machine, by each kind of place: rate, processor time, requests in flight."""
    remote.run(folder, shape, layers, runs)


@app.command("peers")
def measure_peers(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Layers = None,
    runs: Runs = 3,
    cold: Cold = False,
    only: Annotated[str, typer.Option("--peers", help="some of " + ", ".join(peers.PEERS))] = ",".join(peers.PEERS),
    mergekit: Annotated[str | None, typer.Option(help="the executable mergekit-yaml, if not on the PATH")] = None,
) -> None:
    """Time mergekit and PEFT on the same job, and compare the outputs."""
    peers.run(folder, shape, layers, runs, cold, _names("--peers", only, peers.PEERS), mergekit)


def _measured(name: str, what: str, run: Callable[[Path, str, int | None, int, bool], None]) -> None:
    """Add a command that measures something of one model."""

    @app.command(name, help=what)
    def command(
        folder: Folder = Path("bench-models"),
        shape: Shape = "llama-1b",
        layers: Layers = None,
        runs: Runs = 3,
        cold: Cold = False,
    ) -> None:
        run(folder, shape, layers, runs, cold)


_measured("io", "Time plain reading, by each method, and writing.", io.run)
_measured("durability", "Time hashing and syncing as a share of a job that writes a checkpoint.", durability.run)


@app.command("support")
def support() -> None:
    """Plan small inputs of every kind with every method, and keep what the planner says for the support table."""
    print(support_planned.write_planned())


@app.command("report")
def report() -> None:
    """Make the pictures, and in a checkout the tables in README.md, docs and bench/README.md, anew from the rows.

    Raises:
        RequestError: there are no rows.
    """
    if not any(rows.RESULTS.glob("*.csv")):
        raise RequestError(Offence("--results", str(rows.RESULTS), "rows (*.csv)", "none", "measure something first"))
    print("\n".join(map(str, pictures.draw(rows.RESULTS))))
    for document in documents.documents():
        document.write_text(documents.refresh(document))
    if (toy := rows.RESULTS / "toy.csv").exists():
        toy_pictures.draw_tradeoff(table.read(toy), rows.RESULTS / "toy.png")
    if (measured := rows.RESULTS / "real.csv").exists():
        real_pictures.draw_tradeoff(real_table.read(measured), rows.RESULTS / "real.png")


@app.command("toy")
def measure_toy(
    folder: Kept = Path("bench-toy"),
    seeds: Annotated[int, typer.Option(help="seeds 0 to N-1", min=1)] = 6,
) -> None:
    """Run the demo's experiment over several seeds and append its rows."""
    found = experiment.run(folder, range(seeds), WHOLE, lambda text: print(text, flush=True))
    for row in found:
        rows.append("toy", row, table.COLUMNS)


@app.command("real")
def measure_real(
    folder: Kept = Path("bench-real"),
    seed: Annotated[list[int] | None, typer.Option(help="may be repeated (default: 0, 1 and 2)", min=0)] = None,
    small: Annotated[bool, typer.Option("--slice", help="few steps, settings and prompts: shows that it runs")] = False,
) -> None:
    """Align, fine-tune, defend, tune and judge a small real chat model; append its rows.

    About an hour a seed on two cores; every trained model and every answer is kept, so that a rerun goes on.
    """
    for each in seed or (0, 1, 2):
        found = real.run_seed(folder, each, real.SLICE if small else real.WHOLE, lambda text: print(text, flush=True))
        for row in found:
            rows.append("real", row, real_table.COLUMNS)
        print(real_table.markdown(found))


def _names(option: str, text: str, known: Iterable[str]) -> list[str]:
    names, allowed = text.split(","), list(known)
    if unknown := [name for name in names if name not in allowed]:
        raise RequestError(Offence(option, "", "some of " + ",".join(allowed), ",".join(unknown)))
    return names


def _numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", text, re.ASCII):
        raise RequestError(Offence(option, "", "numbers such as 1,8,32", text))
    return [int(number) for number in text.split(",")]
