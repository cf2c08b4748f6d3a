"""What the page says about one output."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from markupsafe import Markup

from safeshard.manifests.card import PLAIN_LINK
from safeshard.manifests.errors import MAX_LISTED, printable
from safeshard.manifests.evaluation import MEASURES, Figure, percent
from safeshard.manifests.grid import MARKS, MEANINGS, NEAR, share_text
from safeshard.manifests.render import caution_text, leak_text
from safeshard.manifests.report.axes import Picture
from safeshard.manifests.report.experts import Experts, tokens_of_experts
from safeshard.manifests.report.heatmap import Maps, heat_maps
from safeshard.manifests.report.histogram import histogram
from safeshard.manifests.report.layers import by_layer
from safeshard.manifests.report.markup import MAX_ROWS, Child, Table, bar, code, link, table
from safeshard.manifests.report.provenance import Provenance, provenance
from safeshard.manifests.schema import Decision, Manifest, ModuleEntry, Run, TensorEntry
from safeshard.manifests.sizes import human

EFFECT_HEADS = {
    "effect.kept_norm": "norm left", "effect.cosine": "cosine to the delta", "effect.delta_norm": "norm of the delta",
}  # fmt: skip
HASH_CHARS = 16  # enough to tell hashes apart by eye; the manifest has all 64
BYTES_OF = {"read": "bytes_read", "write": "bytes_written"}  # the stages whose bytes a manifest has


@dataclass(frozen=True)
class Output:
    """One output, as its template shows it."""

    title: str
    manifest: Manifest
    figures: list[tuple[str, str]]
    warnings: list[str]
    decisions: Table
    histogram: Picture | None
    maps: Maps
    others: Table | None
    layers: list[Picture]
    experts: Experts | None
    evaluations: list[tuple[str, Table]]
    fallbacks: Table
    method: Table
    provenance: Provenance
    run: Table
    stages: Table | None
    modules: Table
    tensors: Table


def output_of(title: str, manifest: Manifest, evaluations: Sequence[tuple[str, Sequence[Figure]]]) -> Output:
    """All about one output. `evaluations`: suites with its figures."""
    modules, maps = manifest.modules, heat_maps(manifest.modules)
    counts = Counter(module.decision for module in modules)
    return Output(
        title=title,
        manifest=manifest,
        figures=_figures(manifest),
        warnings=[caution_text(each) for each in (manifest.warnings or ())[:MAX_LISTED]],
        decisions=table("decisions", ["decision", "modules", "share"], [d for d in MARKS if d in counts],
                        lambda d: [f"{MARKS[d]} {MEANINGS[d]}", counts[d], _share(d, counts)], ["modules"]),
        histogram=histogram(modules),
        maps=maps,
        others=_modules(maps.others, "modules outside of the layers") if maps.others and maps.maps else None,
        layers=by_layer(modules),
        experts=tokens_of_experts(modules),
        evaluations=[(suite, _evaluation(suite, figures)) for suite, figures in evaluations if figures],
        fallbacks=table("fallbacks", ["subject", "asked", "done", "why"], manifest.fallbacks,
                        lambda f: [f.subject or "the job", f.asked, f.done, f.why]),
        method=_method(manifest),
        provenance=provenance(manifest, HASH_CHARS),
        run=_run(manifest.run),
        stages=_stages(manifest.run),
        modules=_modules(modules, "every module"),
        tensors=_tensors(manifest.tensors),
    )  # fmt: skip


def _share(decision: Decision, counts: Counter[Decision]) -> Markup:
    return bar(counts[decision] / counts.total(), "kept-share" if decision == "kept" else "treated-share")


def _figures(manifest: Manifest) -> list[tuple[str, str]]:
    modules, run = manifest.modules, manifest.run
    treated = sum(module.decision != "kept" for module in modules)
    figures = [(f"{treated} of {len(modules)}", "modules treated")]
    if cosines := [m.cosine for m in modules if m.cosine is not None]:
        figures.append((f"{median(cosines):.3g}", "median cosine"))
    thresholds = sorted({m.threshold for m in modules if m.threshold is not None})
    if thresholds:
        figures.append((f"{thresholds[0]:.6g}" + (" ..." if len(thresholds) > 1 else ""), "threshold"))
    if near := sum(bool(module.near_threshold) for module in modules):
        figures.append((f"{near} {NEAR}", "within 1e-5 of the threshold"))
    if manifest.effect is not None and manifest.effect.kept_norm is not None:
        figures.append((share_text(manifest.effect.kept_norm), "of the delta's norm left"))
    if (leak := manifest.leak) is not None:
        figures.append((leak_text(leak), "of the delta's energy on safe inputs let through"))
    return [
        *figures,
        (str(len(manifest.fallbacks)), "fallbacks"),
        (f"{run.wall_s:.3g} s", "wall-clock time"),
        (human(run.peak_host_bytes), "peak host memory"),
    ]


def _evaluation(suite: str, figures: Sequence[Figure]) -> Table:
    return table(
        f"evaluation by {printable(suite)}",
        ["part", "measure", "%", "95 % interval", "prompts", "not graded", "incoherent %", "grader", "sampling",
         "prompts from"],
        figures,
        lambda f: [
            f.part, MEASURES[f.measure], percent(f.value), f"{percent(f.low)} to {percent(f.high)}", f.prompts,
            f.ungraded or None, percent(f.incoherent), f.grader,
            f.sampling + (f", {f.max_tokens} tokens" if f.max_tokens else ""), f.source,
        ],
        ["%", "prompts", "not graded", "incoherent %"],
    )  # fmt: skip


def _method(manifest: Manifest) -> Table:
    method, tool = manifest.method, manifest.tool
    sealed = manifest.blake3 == manifest.content_hash()
    paper = link(method.paper, method.paper) if PLAIN_LINK.fullmatch(method.paper) else method.paper
    options = {"seed": method.seed} | method.options if method.seed is not None else method.options
    pairs: list[tuple[str, Child]] = [
        ("method", method.name),
        ("paper", paper),
        *((f"--{name.replace('_', '-')}", "not set" if value is None else code(json.dumps(value)))
          for name, value in islice(options.items(), MAX_ROWS)),
        ("device", tool.device),
        ("versions", f"safeshard {tool.safeshard}, torch {tool.torch or '-'}, triton {tool.triton or '-'}"),
        ("manifest", (manifest.blake3 or "")[:HASH_CHARS] if sealed else "edited after it was written"),
    ]  # fmt: skip
    left_out = max(0, len(options) - MAX_ROWS)
    return Table("what was run", [], pairs, left_out=left_out)


def _run(run: Run) -> Table:
    pairs: list[tuple[str, Child]] = [
        ("start", run.start.isoformat(sep=" ", timespec="seconds")),
        ("wall-clock time", f"{run.wall_s:.2f} s"),
        ("read", human(run.bytes_read)),
        ("written", human(run.bytes_written)),
        ("peak memory, host", human(run.peak_host_bytes)),
    ]
    if run.peak_device_bytes:
        pairs.append(("peak memory, device", human(run.peak_device_bytes)))
    if run.peak_buffer_bytes is not None:
        pairs.append(("peak of tensors in flight", human(run.peak_buffer_bytes)))
    return Table("the run", [], pairs)


def _stages(run: Run) -> Table | None:
    longest = max(run.seconds.values(), default=0.0)
    if longest <= 0:
        return None
    return table(
        "time by stage",
        ["stage", "of the longest", "seconds", "bytes"],
        list(run.seconds.items()),
        lambda stage: [
            stage[0], bar(stage[1] / longest), f"{stage[1]:.3f}",
            human(getattr(run, BYTES_OF[stage[0]])) if stage[0] in BYTES_OF else None,
        ],
        ["seconds", "bytes"],
    )  # fmt: skip


def _modules(modules: tuple[ModuleEntry, ...], label: str) -> Table:
    """All fields that some module has, a column each."""
    fields = [*(name for name in ModuleEntry.model_fields if name != "effect"), *EFFECT_HEADS]
    names = [name for name in fields if any(_value(m, name) is not None for m in modules)]
    return table(
        label,
        [_head(name) for name in names],
        modules,
        lambda module: [_field(module, name) for name in names],
        [_head(name) for name in names if name not in ("name", "decision", "note")],
    )


def _head(name: str) -> str:
    return EFFECT_HEADS.get(name, name.replace("_", " "))


def _value(module: ModuleEntry, name: str) -> Any:
    """A field of a module's entry or, under its head, of its effect."""
    if name.startswith("effect."):
        return getattr(module.effect, name.removeprefix("effect."), None)
    return getattr(module, name)


def _field(module: ModuleEntry, name: str) -> Child:
    value = _value(module, name)
    if name == "effect.kept_norm" and value is not None:
        return share_text(value)
    if name == "decision":
        return f"{MARKS[module.decision]} {value}"
    if name == "near_threshold":
        return NEAR if value else None
    if isinstance(value, tuple):
        return " ".join(f"{weight:.6g}" for weight in value[:8])
    return f"{value:.6g}" if isinstance(value, float) else value


def _tensors(tensors: tuple[TensorEntry, ...]) -> Table:
    return table(
        "every tensor",
        ["name", "file", "dtype", "shape", "action", "from", "BLAKE3"],
        tensors,
        lambda t: [
            t.name, t.file, t.dtype, " x ".join(map(str, t.shape[:16])), t.action, t.source,
            code(t.blake3[:HASH_CHARS]),
        ],
    )  # fmt: skip
