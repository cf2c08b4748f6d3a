"""What the command line prints about plans, results and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import floor
from statistics import median
from typing import TYPE_CHECKING, Any

from safeshard.manifests.errors import SafeshardError, printable
from safeshard.manifests.grid import effect_text, number, number_name
from safeshard.manifests.render import caution_text, leak_text
from safeshard.manifests.schema import Manifest
from safeshard.manifests.sizes import human
from safeshard.manifests.terminal import grid, layer_bars
from safeshard.streamer.tensor_names import by_layer

if TYPE_CHECKING:
    from safeshard.streamer.methods.base import Job
    from safeshard.streamer.plan.job_plan import JobPlan
    from safeshard.streamer.run.downloads import Download
    from safeshard.streamer.run.factors.save_factors import Factors
    from safeshard.streamer.run.result import Result

MAX_OF_A_KIND = 5


def summary(results: Sequence[Result]) -> str:
    """One line a job, then the run's bytes, seconds and memory."""
    lines = []
    for result in results:
        if (manifest := result.manifest) is None:
            lines += _part(result)
            continue
        decisions = Counter(entry.decision for entry in manifest.modules)
        counts = ", ".join(f"{n} {decision}" for decision, n in decisions.most_common())
        earlier = " (finished earlier)" if result.plan.finished else ""
        lines.append(f"{result.job.title}: {printable(result.output)}{earlier}")
        lines.append(f"  {len(result.plan.modules)} of {result.plan.expected} modules: {counts}")
        if effect := effect_text(manifest.effect):
            lines.append(f"  {effect}")
        lines += _rank(result.plan)
        kinds = result.plan.kinds
        if any("experts" in kind for kind in kinds):
            lines.append("  " + ", ".join(f"{kind} {n} of {of}" for kind, (n, of) in sorted(kinds.items())))
        if (leak := manifest.leak) is not None:
            lines.append(f"  leak {leak_text(leak)} of the delta's energy on safe inputs{_strength(manifest)}")
        lines += [f"  note: {f.asked} -> {f.done} ({f.why})" + (f": {printable(f.subject)}" if f.subject else "")
                  for f in manifest.fallbacks[:5]]  # fmt: skip
        if len(manifest.fallbacks) > 5:
            lines.append(f"  and {len(manifest.fallbacks) - 5} more notes in the manifest")
    finished = [r.manifest.run for r in results if r.manifest and not r.plan.finished]
    finished += [r.record.run for r in results if r.record]
    if finished:
        last, written = finished[-1], sum(run.bytes_written for run in finished)
        rate = human(last.bytes_read / last.wall_s) if last.wall_s else "-"
        lines.append(
            f"read {human(last.bytes_read)}, wrote {human(written)} in {last.wall_s:.1f} s ({rate}/s), "
            f"peak memory {human(last.peak_host_bytes)}"
        )
    return "\n".join(lines)


def _part(result: Result) -> list[str]:
    """A line about a part of an output."""
    part, modules = result.plan.part, len(result.plan.modules)
    if part is None:
        return []
    where = f"{result.job.title}: {printable(result.output)}: part {part}"
    if result.record is not None:
        tensors = sum(len(file.tensors) for file in result.plan.files)
        return [f"{where}: {modules} modules, {tensors} tensors written"]
    return [f"{where}: {modules} modules measured; once all parts are, finish decides, or each part run again"]


def gathered(results: Sequence[Result]) -> str:
    """What a dry run of `finish` says."""
    lines = []
    for result in results:
        state = "finished earlier" if result.plan.finished else "every part is there"
        lines.append(f"{result.job.title}: {printable(result.output)}: {state}")
    return "\n".join([*lines, "dry run: nothing was written"])


def _strength(manifest: Manifest) -> str:
    """At which strength, where that followed from a leak."""
    for name in ("penalty", "strength"):
        for module in manifest.modules:
            if (value := getattr(module, name)) is not None:
                return f", at {name} {value:g}"
    return ""


def _rank(each: JobPlan) -> list[str]:
    if each.rank is None:
        return []
    return [f"  rank {each.rank}" + (f": serve it with --max-lora-rank {each.rank}" if each.serve_rank else "")]


def plan(plans: Sequence[JobPlan], memory: int, device: str) -> str:
    """What a dry run says: bytes to read and write, modules, and the memory it takes, of `memory` bytes allowed."""
    import torch

    from safeshard.streamer.run.calibrated import arithmetic_bytes, planned_steps
    from safeshard.streamer.run.downloads import download
    from safeshard.streamer.run.flow.bundles import bytes_apart
    from safeshard.streamer.run.flow.steps import module_steps, workers_for
    from safeshard.streamer.run.flow.tasks import JobRun

    runs = [JobRun(p) for p in plans]
    steps = [*module_steps(runs, bytes_apart(torch.device(device))), *planned_steps(runs)]
    read = sum(step.nbytes + step.copied * step.strips for step in steps) + sum(
        copy.ref.nbytes for p in plans for copy in p.copies
    )
    lines = []
    for each in plans:
        lines.append(f"{each.job.title}: {printable(each.job.output) if each.job.writes_model else 'no output'}")
        lines.append(
            f"  modules {len(each.modules)} of {each.expected} expected, to write {human(each.bytes_to_write)}"
        )
        lines += _rank(each)
        lines += [f"  note: {f.asked} -> {f.done} ({f.why})" for f in each.fallbacks[:5]]
    costs = sorted((step.cost for step in steps), reverse=True)[: workers_for(torch.device("cpu")) + 4]
    in_flight = human(min(sum(costs), memory))
    lines.append(f"to read {human(read)} in {len(steps)} steps; tensors in flight take at most {in_flight}")
    lines += _downloads(download(runs))
    if calibrated := arithmetic_bytes(runs):
        lines.append(
            f"a layer with its Gram matrices, factors and compensation takes at most {human(calibrated)} on the device"
        )
    lines.append("dry run: nothing was written")
    return "\n".join(lines)


def factors_plan(made: Factors) -> str:
    """What a dry run of `calibrate` says."""
    return (
        f"factors: {printable(made.output)}\n"
        f"  to write at most {human(made.bytes_to_write)}; a layer takes {human(made.memory)} of memory\n"
        + "".join(f"{line}\n" for line in _downloads(made.download))
        + "dry run: nothing was written"
    )


def _downloads(need: Download) -> list[str]:
    """What is to be fetched from afar, and where it stays."""
    if not need.nbytes:
        return []
    kept = f"; the Hub's cache keeps {human(need.kept)} of it, its largest shard {human(need.largest)}"
    return [f"to download {human(need.nbytes)} in {need.requests} requests{kept if need.kept else ''}"]


def scores(results: Sequence[Result], color: bool = False) -> str:
    """A table of cosines: a row a module, a column a fine-tuned model; then what thresholds would change."""
    heads = _heads(results)
    modules = list(dict.fromkeys(module for r in results for module in r.cosines))
    cosines = [[result.cosines.get(module) for result in results] for module in modules]
    rows = [
        [printable(module, 60), *("-" if c is None else f"{c:.4f}" for c in each)]
        for module, each in zip(modules, cosines, strict=True)
    ]
    known = [_known(result) for result in results]
    figures: dict[str, Callable[[list[float]], float]] = {"lowest": min, "median": median, "highest": max}
    rows += [
        [""],
        *([name, *(f"{figure(each):.4f}" if each else "-" for each in known)] for name, figure in figures.items()),
    ]
    if any(undefined := [len(r.cosines) - len(each) for r, each in zip(results, known, strict=True)]):
        rows.append(["undefined", *map(str, undefined)])
    changes = [[f"{t:g}", *(f"{_below(each, t)} of {len(each)}" for each in known)] for t in _thresholds(known)]
    return "\n\n".join(
        [grid(["module", *heads], rows, color), grid(["a threshold of ... changes so many", *heads], changes, color)]
    )


def scores_by_layer(results: Sequence[Result], color: bool = False) -> str:
    """The cosines of each fine-tuned model as bars, a line a layer."""
    return "\n\n".join(
        f"{head}\n{layer_bars(by_layer(result.cosines), 'cosine', color)}"
        for head, result in zip(_heads(results), results, strict=True)
    )


def values_by_layer(manifest: Manifest, color: bool = False) -> str:
    """The values that an output's table shows as bars, a line a layer."""
    values = {module.name: number(module) for module in manifest.modules}
    return layer_bars(by_layer(values), number_name(manifest.modules), color)


def _heads(results: Sequence[Result]) -> list[str]:
    """The fine-tuned models' names: their last parts, or in full where several end alike."""
    names = [r.plan.finetuned.source.spec for r in results]
    short = [printable(name.rstrip("/").rsplit("/", 1)[-1], 24) for name in names]
    return [printable(name) if short.count(s) > 1 else s for name, s in zip(names, short, strict=True)]


def _known(result: Result) -> list[float]:
    return sorted(cosine for cosine in result.cosines.values() if cosine is not None)


def _below(cosines: Sequence[float], threshold: float) -> int:
    return sum(cosine < threshold for cosine in cosines)


def _thresholds(known: Sequence[Sequence[float]]) -> list[float]:
    """Round thresholds from the first that changes a module to the first that changes all."""
    values = [cosine for each in known for cosine in each]
    if not values:
        return []
    step = 0.05 if max(values) - min(values) <= 0.5 else 0.1
    first, last = floor(min(values) / step) + 1, floor(max(values) / step) + 1
    return [round(number * step, 2) for number in range(first, last + 1)]


def suggestions(results: Sequence[Result]) -> str:
    """A threshold for each model: in the middle of the widest gap between two cosines that lets 5 to 50 % change."""
    lines = []
    for head, result in zip(_heads(results), results, strict=True):
        known = _known(result)
        counts = range(max(1, len(known) // 20), len(known) // 2 + 1)
        if not counts or len(known) < 2:
            lines.append(f"{head}: too few cosines to suggest a threshold")
            continue
        count = max(counts, key=lambda n: known[n] - known[n - 1])
        low, high = known[count - 1], known[count]
        threshold = next(t for t in (round((low + high) / 2, digits) for digits in range(2, 17)) if low < t <= high)
        lines.append(
            f"{head}: --threshold {threshold:g} changes {count} of {len(known)} modules; it lies in the widest gap, "
            f"between cosines of {low:.4f} and {high:.4f}"
        )
    lines.append("a suggestion knows nothing of safety or of the task: measure both")
    return "\n".join(lines)


def warnings(results: Sequence[Result]) -> list[str]:
    """The warnings about all outputs, those of a kind together, the first few of each."""
    kinds: dict[str, list[str]] = {}
    for result in results:
        where = f"{printable(result.output)}: " if result.job.writes_model else ""
        for each in result.warnings:
            kinds.setdefault(each.kind, []).append(f"warning: {where}{caution_text(each)}")
    lines = []
    for texts in kinds.values():
        lines += texts[:MAX_OF_A_KIND]
        if len(texts) > MAX_OF_A_KIND:
            lines.append(f"warning: and {len(texts) - MAX_OF_A_KIND} more outputs of that kind")
    return lines


def failure(job: Job, error: SafeshardError) -> dict[str, Any]:
    """A job of a batch that failed, as JSON values."""
    return {"method": job.method, "output": str(job.output), "error": str(error)}


def outcome(result: Result) -> dict[str, Any]:
    """A result as JSON values, for `--json`."""
    job, manifest = result.job, result.manifest
    base: dict[str, Any] = {"method": job.method, "output": str(job.output) if job.writes_model else None}
    base |= {"modules": len(result.plan.modules), "expected": result.plan.expected}
    base["warnings"] = [each.model_dump(mode="json", exclude_none=True) for each in result.warnings]
    if result.plan.rank is not None:
        base["rank"] = result.plan.rank
    if manifest is not None:
        decisions = Counter(entry.decision for entry in manifest.modules)
        if manifest.effect is not None:
            base["effect"] = manifest.effect.model_dump(mode="json", exclude_none=True)
        if manifest.leak is not None:
            base["leak"] = manifest.leak
        return base | {"decisions": dict(decisions), "run": manifest.run.model_dump(mode="json")}
    if result.plan.part is not None and result.plan.finished is None:
        record = result.record
        base |= {"part": str(result.plan.part), "finished": record is not None}
        if record is not None:
            return base | {"run": record.run.model_dump(mode="json")}
    if result.cosines:
        return base | {"source": result.plan.finetuned.source.spec, "cosines": dict(result.cosines)}
    from safeshard.streamer.run.downloads import download
    from safeshard.streamer.run.flow.tasks import JobRun

    return base | {
        "bytes_to_write": result.plan.bytes_to_write,
        "download": asdict(download([JobRun(result.plan)])),
    }
