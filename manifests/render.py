"""A manifest as text for a terminal: the decisions as a table of layers x kinds, and a summary of the run."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal

from safeshard.manifests.errors import MAX_LISTED, printable
from safeshard.manifests.grid import (
    MARKS,
    MEANINGS,
    NEAR,
    Stack,
    arrange,
    cell_text,
    effect_text,
    kept_text,
    prevailing,
    share_text,
)
from safeshard.manifests.schema import MANIFEST_NAME, Caution, Decision, Manifest, ModuleEntry, Run
from safeshard.manifests.sizes import human
from safeshard.manifests.terminal import Painted, Span, grid

COLOURS: dict[Decision, str] = {
    "kept": "dim",
    "merged": "yellow",
    "projected": "cyan",
    "selected": "green",
    "shrunk": "bright_green",
    "scaled": "magenta",
    "reverted": "blue",
}
GAP = "  "
MAX_PLACES = 20_000  # of a table; 126 layers of 7 modules have about a thousand
LEAST_LEAK = 1e-5  # of those that are said in figures
MAX_OTHERS = 1000  # modules outside of tables that are listed


def render(manifest: Manifest, width: int | None = None, color: bool = False) -> str:
    """The whole picture: a table per stack of layers, the legend, the remaining modules, the summary.

    Tables wider than `width` columns (default: the terminal's) are continued below. `color` adds ANSI colours; names
    from the manifest never bring escape sequences of their own.
    """
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    stacks, others = arrange(manifest.modules)
    others += [m for s in stacks if _places(s) > MAX_PLACES for cell in s.cells.values() for m in cell]
    stacks = [stack for stack in stacks if _places(stack) <= MAX_PLACES]
    blocks = [block for stack in stacks for block in _tables(stack, width, color, cell_text)]
    if others:
        blocks.append(grid([], map(_plain, others[:MAX_OTHERS]), color, left=3))
    if len(others) > MAX_OTHERS:
        blocks.append(f"and {len(others) - MAX_OTHERS} more modules, in {MANIFEST_NAME}")
    if manifest.modules:
        blocks.append(_legend(manifest.modules, color))
    if any(m.effect and share_text(m.effect.kept_norm or 0.0) != "100.0%" for m in manifest.modules):
        blocks.append("share of the delta's norm that is left")
        blocks += [block for stack in stacks for block in _tables(stack, width, color, kept_text)]
    return "\n\n".join([*blocks, render_summary(manifest)]) + "\n"


def render_summary(manifest: Manifest) -> str:
    """Method, decisions, inputs, figures and fallbacks, a line each."""
    rows = [("method", _method(manifest)), ("modules", _decisions(manifest.modules))]
    if thresholds := sorted({m.threshold for m in manifest.modules if m.threshold is not None}):
        rows.append(("threshold", _threshold(thresholds, manifest.modules)))
    if effect := effect_text(manifest.effect):
        rows.append(("effect", effect))
    if (leak := manifest.leak) is not None:
        rows.append(("leak", f"{leak_text(leak)} of the delta's energy on safe inputs"))
    rows.append(("tensors", _counts(tensor.action for tensor in manifest.tensors)))
    rows += [
        (printable(role), printable(i.source + (f"@{i.revision}" if i.revision else "")))
        for role, i in manifest.inputs.items()
    ]
    rows += _figures(manifest.run)
    for fallback in manifest.fallbacks[:MAX_LISTED]:
        subject = f"{printable(fallback.subject)}: " if fallback.subject else ""
        asked, done, why = map(printable, (fallback.asked, fallback.done, fallback.why))
        rows.append(("fallback", f"{subject}asked {asked}, done {done}: {why}"))
    if len(manifest.fallbacks) > MAX_LISTED:
        rows.append(("fallback", f"and {len(manifest.fallbacks) - MAX_LISTED} more"))
    for each in (manifest.warnings or ())[:MAX_LISTED]:
        rows.append(("warning", caution_text(each)))
    pad = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{pad}}{GAP}{text}" for label, text in rows)


def caution_text(caution: Caution) -> str:
    """A warning as one line."""
    remedy = f" ({printable(caution.remedy)})" if caution.remedy else ""
    return f"{printable(caution.text)}{remedy}"


def _tables(stack: Stack, width: int, color: bool, show: Callable[[tuple[ModuleEntry, ...]], str]) -> Iterator[str]:
    """The stack's table of what `show` says, cut into as many as it takes to stay within `width`."""
    texts = {place: show(modules) for place, modules in stack.cells.items()}
    widths = {kind: len(printable(title)) for kind, title in stack.titles.items()}
    for (_, kind), text in texts.items():
        widths[kind] = max(widths[kind], len(text))
    margin = max(len("layer"), len(str(stack.layers[-1])))
    for kinds in _fitting(widths, width - margin):
        rows: list[list[str | Painted | Span]] = [
            [str(layer), *(_painted(texts.get((layer, k), ""), stack.cells.get((layer, k), ())) for k in kinds)]
            for layer in stack.layers
        ]
        yield f"{printable(stack.prefix)}\n{grid(['layer', *(stack.titles[k] for k in kinds)], rows, color, left=0)}"


def _fitting(widths: dict[str, int], room: int) -> Iterator[list[str]]:
    row: list[str] = []
    used = 0
    for kind, width in widths.items():
        if row and used + len(GAP) + width > room:
            yield row
            row, used = [], 0
        row.append(kind)
        used += len(GAP) + width
    yield row


def _painted(text: str, modules: tuple[ModuleEntry, ...]) -> Painted:
    return Painted(text, COLOURS[prevailing(modules)] if modules else "")


def _plain(module: ModuleEntry) -> list[Painted | str]:
    return [_painted(module.name, (module,)), cell_text((module,)), module.note or ""]


def _places(stack: Stack) -> int:
    return len(stack.layers) * len(stack.titles)


def _legend(modules: tuple[ModuleEntry, ...], color: bool) -> str:
    used = {m.decision: m for m in reversed(modules)}
    items: list[Painted | str] = [
        _painted(f"{mark} {MEANINGS[d]}  ", (used[d],)) for d, mark in MARKS.items() if d in used
    ]
    if any(m.near_threshold for m in modules):
        items.append(f"{NEAR} within 1e-5 of the threshold")
    return grid([], [items], color, left=len(items))


def _method(manifest: Manifest) -> str:
    seed = "" if manifest.method.seed is None else f", seed {manifest.method.seed}"
    return f"{printable(manifest.method.name)} ({printable(manifest.method.paper)}){seed}"


def _decisions(modules: tuple[ModuleEntry, ...]) -> str:
    return _counts(module.decision for module in modules)


def _counts(labels: Iterator[str]) -> str:
    counts = Counter(labels)
    parts = [f"{count} {label}" for label, count in counts.most_common()]
    return f"{counts.total()}: {', '.join(parts)}" if parts else "none"


def _threshold(thresholds: list[float], modules: tuple[ModuleEntry, ...]) -> str:
    text = ", ".join(map(str, thresholds))
    near = sum(bool(module.near_threshold) for module in modules)
    return f"{text} ({near} within 1e-5 of it)" if near else text


def _figures(run: Run) -> list[tuple[str, str]]:
    stages = ", ".join(f"{printable(stage)} {seconds:.1f} s" for stage, seconds in run.seconds.items())
    memory = human(run.peak_host_bytes)
    if run.peak_buffer_bytes is not None:
        memory += f", with up to {human(run.peak_buffer_bytes)} of tensors in flight"
    if run.peak_device_bytes:
        memory += f"; {human(run.peak_device_bytes)} on the device"
    return [
        ("bytes", f"{human(run.bytes_read)} read, {human(run.bytes_written)} written"),
        ("time", f"{run.wall_s:.1f} s" + (f" ({stages})" if stages else "")),
        ("peak memory", memory),
    ]


def leak_text(leak: float) -> str:
    """A share in percent, to three digits and without an exponent."""
    if 0 < leak < LEAST_LEAK:
        return f"under {100 * LEAST_LEAK:g} %"
    return f"{Decimal(f'{100 * leak:.3g}'):f} %"
