"""What the planner says of each kind of inputs, method by method: the cells of the support table."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safeshard.bench.inputs.support import COLUMNS, KINDS, NONE, NOTED, PLANNED, REFUSED, YES
from safeshard.bench.inputs.support_inputs import BUILDERS, FAMILIES, Inputs
from safeshard.manifests.errors import RequestError
from safeshard.streamer.methods.lssf import Lssf
from safeshard.streamer.methods.resta import Resta
from safeshard.streamer.methods.ridge import Ridge
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.methods.safelora import SafeLora
from safeshard.streamer.methods.safemerge import SafeMerge
from safeshard.streamer.methods.scale import Scale
from safeshard.streamer.methods.score import Score
from safeshard.streamer.plan.planner import Planner

ADAPTERS = frozenset(kind.name for kind in KINDS if kind.group == "adapter") | {"head_of_other_rows"}

GATED = frozenset(
    {"padded_base", "head_of_other_rows", "safe_resized", "safe_trained"}
)  # kinds of what gates alone take


def plan_kind(name: str, folder: Path) -> dict[str, str]:
    """Column -> what the planner says of a kind's inputs, which are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    it = Inputs(folder, name if name in FAMILIES else "llama")
    BUILDERS[name](it)
    at = it.write()
    return dict(_cells(name, at, folder / "out"))


def _cells(name: str, at: Mapping[str, str], output: Path) -> Iterator[tuple[str, str]]:
    for column in COLUMNS:
        method, _, form = column.partition("_")
        lacks = (form == "full" and name in ADAPTERS) or (method != "gate" and name in GATED)
        yield column, NONE if lacks else _cell(method, form, at, output)


def _cell(method: str, form: str, at: Mapping[str, str], output: Path) -> str:
    """One outcome; of the gated methods the one that all of them share."""
    given = {"aligned": at["aligned"], "output": output}
    given |= {"adapter": at["adapter"]} if form == "adapter" else {"finetuned": at["finetuned"]}
    data = {"calibration": at["data"], "samples": 2}
    if method == "scale":
        return _outcome(Scale, **given, factor=0.5)
    if method == "safedelta":
        return _outcome(SafeDelta, **given, **data)
    if method == "ridge":
        return _outcome(Ridge, **given, **data)
    gate = given | {"unaligned": at["unaligned"]}
    safe = {"safe_adapter": at["safe_adapter"]} if form == "adapter" else {"safe": at["safe"]}
    return _outcome(SafeMerge, **gate, **safe)


def gate_outcomes(at: Mapping[str, str], output: Path) -> Iterator[tuple[str, str]]:
    """What methods of no column of their own say of adapters: the gate's column stands for them."""
    gate = {"aligned": at["aligned"], "unaligned": at["unaligned"], "adapter": at["adapter"]}
    yield "safelora", _outcome(SafeLora, **gate, threshold=0.3, output=output)
    yield "score", _outcome(Score, **gate)
    yield "resta", _outcome(Resta, **gate, output=output)
    yield "lssf", _outcome(Lssf, **gate, calibration=at["data"], samples=2, output=output)


def _outcome(kind: type[Any], **options: Any) -> str:
    try:
        plan = Planner().plan_inputs(kind(**options))
    except RequestError:
        return REFUSED
    return NOTED if plan.fallbacks else YES


def write_planned() -> Path:
    """Plan every kind and write what came of it."""
    with tempfile.TemporaryDirectory() as folder, PLANNED.open("w", newline="") as out:
        rows = csv.DictWriter(out, ["kind", *COLUMNS], lineterminator="\n")
        rows.writeheader()
        for kind in KINDS:
            rows.writerow({"kind": kind.name} | plan_kind(kind.name, Path(folder) / kind.name))
    return PLANNED
