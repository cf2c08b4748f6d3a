"""What the page says about one output."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element

from safeshard.manifests.card import PLAIN_LINK, shown_source
from safeshard.manifests.errors import MAX_LISTED, printable
from safeshard.manifests.grid import MARKS, MEANINGS, NEAR, share_text
from safeshard.manifests.render import caution_text, leak_text
from safeshard.manifests.report.experts import expert_maps
from safeshard.manifests.report.heatmap import heat_maps
from safeshard.manifests.report.histogram import histogram
from safeshard.manifests.report.markup import MAX_ROWS, Child, bar, facts, folded, table, tag
from safeshard.manifests.schema import Fallback, Input, Manifest, ModuleEntry, Run, TensorEntry
from safeshard.manifests.sizes import human

EFFECT_HEADS = {
    "effect.kept_norm": "norm left", "effect.cosine": "cosine to the delta", "effect.delta_norm": "norm of the delta",
}  # fmt: skip
HASH_CHARS = 16  # enough to tell hashes apart by eye; the manifest has all 64


def section(title: str, manifest: Manifest, anchor: str) -> Element:
    """All about one output, under its title."""
    return tag(
        "section",
        tag("header", tag("h1", title), _opening(manifest), _figures(manifest), *_warnings(manifest)),
        *_decisions(manifest.modules),
        *expert_maps(manifest.modules),
        *_fallbacks(manifest.fallbacks),
        tag("h2", "What was run"),
        _method(manifest),
        tag("h2", "Inputs"),
        _inputs(manifest.inputs),
        tag("h2", "Run"),
        *_run(manifest.run),
        tag("h2", "Details"),
        folded(f"Every module ({len(manifest.modules)})", _modules(manifest.modules)),
        folded(f"Every tensor ({len(manifest.tensors)})", _tensors(manifest.tensors)),
        id=anchor,
    )


def counts_text(modules: tuple[ModuleEntry, ...]) -> str:
    """Decisions with their counts, in words."""
    counts = Counter(module.decision for module in modules)
    return ", ".join(f"{counts[d]} {d}" for d in MARKS if d in counts) or "no modules"


def _opening(manifest: Manifest) -> Element:
    return tag(
        "p",
        f"safeshard {printable(manifest.tool.safeshard, 40)} applied ",
        tag("b", manifest.method.name),
        " to a fine-tuned model. It does not claim that the model is safe. Evaluate it for your use.",
    )


def _figures(manifest: Manifest) -> Element:
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
    figures += [
        (str(len(manifest.fallbacks)), "fallbacks"),
        (f"{run.wall_s:.3g} s", "wall-clock time"),
        (human(run.peak_host_bytes), "peak host memory"),
    ]
    return tag("dl", *(tag("div", tag("dt", label), tag("dd", value)) for value, label in figures), class_="figures")


def _warnings(manifest: Manifest) -> Iterator[Element]:
    for each in (manifest.warnings or ())[:MAX_LISTED]:
        yield tag("p", tag("b", "Warning: "), caution_text(each), class_="warning")


def _decisions(modules: tuple[ModuleEntry, ...]) -> Iterator[Element]:
    counts = Counter(module.decision for module in modules)
    yield tag("h2", "Decisions")
    yield table(
        ["decision", "modules", "share"],
        [decision for decision in MARKS if decision in counts],
        lambda d: [f"{MARKS[d]} {MEANINGS[d]}", counts[d], bar(counts[d] / len(modules))],
        numeric=["modules"],
    )
    if (chart := histogram(modules)) is not None:
        yield tag("h2", "Distribution")
        yield chart
    maps, others = heat_maps(modules)
    if maps:
        yield tag("h2", "Layer by layer")
        yield from maps
    if others:
        yield tag("h2", "Outside of the layers")
        yield _modules(tuple(others))


def _fallbacks(fallbacks: tuple[Fallback, ...]) -> Iterator[Element]:
    if fallbacks:
        yield tag("h2", "Fallbacks")
        yield tag("p", "Where something else was done than was asked.")
        yield table(["subject", "asked", "done", "why"], fallbacks, lambda f: [f.subject, f.asked, f.done, f.why])


def _method(manifest: Manifest) -> Element:
    method, tool = manifest.method, manifest.tool
    sealed = manifest.blake3 == manifest.content_hash()
    link = tag("a", method.paper, href=method.paper, rel="noreferrer") if PLAIN_LINK.fullmatch(method.paper) else None
    pairs: list[tuple[str, Child]] = [("method", method.name), ("paper", method.paper if link is None else link)]
    options = {"seed": method.seed} | method.options if method.seed is not None else method.options
    pairs += [
        (f"--{name.replace('_', '-')}", "not set" if value is None else tag("code", json.dumps(value)))
        for name, value in islice(options.items(), MAX_ROWS)
    ]
    pairs += [
        ("device", tool.device),
        ("versions", f"safeshard {tool.safeshard}, torch {tool.torch or '-'}, triton {tool.triton or '-'}"),
        ("manifest", (manifest.blake3 or "")[:HASH_CHARS] if sealed else "edited after it was written"),
    ]
    return facts(pairs)


def _inputs(inputs: dict[str, Input]) -> Element:
    return table(
        ["role", "source", "revision", "files", "size"],
        list(inputs.items()),
        lambda item: [
            item[0],
            tag("code", shown_source(item[1])),
            item[1].revision,
            len(item[1].files),
            human(sum(file.size for file in item[1].files)),
        ],
        numeric=["files", "size"],
    )


def _run(run: Run) -> Iterator[Element]:
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
    yield facts(pairs)
    longest = max(run.seconds.values(), default=0.0)
    if longest > 0:
        yield table(
            ["stage", "", "seconds"],
            list(run.seconds.items()),
            lambda stage: [stage[0], bar(stage[1] / longest), f"{stage[1]:.3f}"],
            numeric=["seconds"],
        )
        yield tag("p", "Stages run side by side on several threads, so their seconds may add up to more than the run.")


def _modules(modules: tuple[ModuleEntry, ...]) -> Element:
    """All fields that some module has, a column each."""
    fields = [*(name for name in ModuleEntry.model_fields if name != "effect"), *EFFECT_HEADS]
    names = [name for name in fields if any(_value(m, name) is not None for m in modules)]
    return table(
        [_head(name) for name in names],
        modules,
        lambda module: [_field(module, name) for name in names],
        numeric=[_head(name) for name in names if name not in ("name", "decision", "note")],
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


def _tensors(tensors: tuple[TensorEntry, ...]) -> Element:
    return table(
        ["name", "file", "dtype", "shape", "action", "from", "BLAKE3"],
        tensors,
        lambda t: [
            t.name,
            t.file,
            t.dtype,
            " x ".join(map(str, t.shape[:16])),
            t.action,
            t.source,
            tag("code", t.blake3[:HASH_CHARS]),
        ],
    )
