"""`safeshard bench`: make models, measure, append rows to bench/results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from safeshard.bench import models, pipeline, rows, safedelta
from safeshard.bench.toy import experiment, pictures, table
from safeshard.bench.toy.defences import WHOLE
from safeshard.manifests.errors import Offence, RequestError

app = typer.Typer(no_args_is_help=True, help="Make synthetic models and measure.\n\nRows go to bench/results.")
Folder = Annotated[Path, typer.Option("--folder", help="where the models lie; they are made once and kept")]
Shape = Annotated[str, typer.Option("--shape", help=" or ".join(models.SHAPES))]
Layers = Annotated[
    int | None, typer.Option("--layers", help="decoder layers, fewer than the shape's own to save time", min=1)
]


@app.command("make-models")
def make_models(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Layers = None,
    adapters: Annotated[int, typer.Option(help="fine-tuned adapters", min=1)] = 1,
    rank: Annotated[int, typer.Option(help="of the adapters", min=1)] = 16,
    full: Annotated[bool, typer.Option("--full", help="also full fine-tuned and safe checkpoints")] = False,
) -> None:
    """Write aligned, unaligned, safe and adapter-N folders: random weights of a real shape."""
    size = _shape(shape)
    paths = models.make_models(folder, size, layers=layers or size.layers, adapters=adapters, rank=rank, finetuned=full)
    print("\n".join(map(str, paths.values())))


@app.command("pipeline")
def measure_pipeline(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Layers = None,
    adapters: Annotated[str, typer.Option(help="numbers of adapters in a batch")] = "1,8,32",
    runs: Annotated[int, typer.Option(help="repetitions; the median counts", min=1)] = 3,
    cold: Annotated[bool, typer.Option("--cold", help="drop the files from the page cache first")] = False,
    full: Annotated[bool, typer.Option("--full", help="also jobs on full checkpoints")] = False,
) -> None:
    """Time whole jobs from outside, with peak memory, against plainly reading the same bytes."""
    _shape(shape)
    counts = _numbers("--adapters", adapters)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.run(folder, shape, layers, counts, runs, cold, full)


@app.command("safedelta")
def measure_safedelta(
    folder: Folder = Path("bench-models"),
    shape: Shape = "llama-1b",
    layers: Layers = 2,
    jobs: Annotated[str, typer.Option(help="numbers of LoRA jobs in a batch")] = "1,16",
    runs: Annotated[int, typer.Option(help="repetitions; the median counts", min=1)] = 3,
) -> None:
    """Time Safe Delta: one weight on its own, and whole jobs that share a calibration."""
    _shape(shape)
    counts = _numbers("--jobs", jobs)
    for threads in (1, 2):
        safedelta.run_weight(runs, threads)
    safedelta.run_jobs(folder, shape, layers, counts, runs)


@app.command("tables")
def refresh_tables() -> None:
    """Make the tables in README.md and bench/README.md, and the toy's picture, anew from the rows in bench/results."""
    for document in rows.documents():
        document.write_text(rows.refresh(document))
    pictures.draw_tradeoff(table.read(rows.RESULTS / "toy.csv"), rows.RESULTS / "toy.png")


@app.command("toy")
def measure_toy(
    folder: Annotated[Path, typer.Option("--folder", help="where models and outputs go, and are kept")] = Path(
        "bench-toy"
    ),
    seeds: Annotated[int, typer.Option(help="seeds 0 to N-1", min=1)] = 6,
) -> None:
    """Run the demo's experiment over several seeds and append its rows."""
    found = experiment.run(folder, range(seeds), WHOLE, lambda text: print(text, flush=True))
    for row in found:
        rows.append("toy", row, table.COLUMNS)


def _shape(name: str) -> models.Shape:
    if name not in models.SHAPES:
        raise RequestError(Offence("--shape", "", " or ".join(models.SHAPES), name))
    return models.SHAPES[name]


def _numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", text, re.ASCII):
        raise RequestError(Offence(option, "", "numbers such as 1,8,32", text))
    return [int(number) for number in text.split(",")]
