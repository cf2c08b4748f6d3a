"""Pictures for papers, by matplotlib: cosines of fine-tuned models, values of a finished output's modules."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from safeshard.manifests.errors import printable
from safeshard.manifests.grid import number, number_name
from safeshard.manifests.schema import Manifest
from safeshard.streamer.disk import check_file, replace_file
from safeshard.streamer.extras import require, require_installed
from safeshard.streamer.tensor_names import by_layer

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
BINS = 24
FARTHEST = 1e9  # cosines, shares and leaks are far from it


def check_plot(file: Path, overwrite: bool) -> None:
    """Refuse, before any work, a picture that could not be drawn or written."""
    require_installed("matplotlib", "report")
    check_file(file, SUFFIXES, overwrite, "--plot")


def draw_values(models: Mapping[str, Mapping[str, float | None]], name: str, file: Path) -> None:
    """Draw values of modules by model: how they are distributed, and by layer, medians joined, ranges shaded."""
    figure = require("matplotlib.figure", "report").Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = {model: _drawable(values) for model, values in models.items()}
    bounds = _bounds([value for values in shown.values() for value in values.values() if value is not None])
    for n, (model, values) in enumerate(shown.items()):
        known = [value for value in values.values() if value is not None]
        layers = {int(k): sorted(v) for k, v in by_layer(values).items() if k != "other"}
        style = {"color": COLOURS[n % len(COLOURS)], "label": _plain(model)}
        left.hist(known, BINS, range=bounds, histtype="step", **style)
        right.plot(list(layers), [*map(median, layers.values())], "o-", markersize=3, **style)
        low, high = [v[0] for v in layers.values()], [v[-1] for v in layers.values()]
        right.fill_between(list(layers), low, high, alpha=0.15, color=style["color"])
    left.set(xlabel=name, ylabel="modules")
    right.set(xlabel="layer", ylabel=name)
    left.locator_params(axis="y", integer=True)
    right.locator_params(axis="x", integer=True)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    if len(models) > 1:
        right.legend(fontsize=8)
    write_figure(figure, file)


def _drawable(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Values held within what any axis shows: a manifest of others may say 1e308."""
    return {name: None if value is None else min(max(value, -FARTHEST), FARTHEST) for name, value in values.items()}


def _bounds(values: Sequence[float]) -> tuple[float, float] | None:
    """The range to count in; wide enough to have bins where values differ by their last digits alone."""
    if not values:
        return None
    low, high = min(values), max(values)
    least = 1e-6 * max(1.0, abs(low), abs(high))
    return (low, high) if high - low > least else (low - least, high + least)


def _plain(name: str) -> str:
    """A name that matplotlib takes for no formula."""
    return printable(name).replace("$", r"\$")


def draw_output(manifest: Manifest, title: str, file: Path) -> None:
    """Draw what `inspect` shows of an output: its cosines, shares or leaks."""
    draw_values({title: {m.name: number(m) for m in manifest.modules}}, number_name(manifest.modules), file)


def write_figure(figure: Any, file: Path) -> None:
    """Write a picture in the format of the file's name: the same bytes whenever it is drawn, text as text."""
    matplotlib = require("matplotlib", "report")
    data = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix, {"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "safeshard", "svg.fonttype": "none"}):
        figure.savefig(data, format=file.suffix[1:], dpi=110, metadata=metadata)
    replace_file(file, data.getvalue())
