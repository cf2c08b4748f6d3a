"""The public functions: the commands, callable.

Their keywords are the fields of the options. `api.pyi`, which type checkers and editors read, spells them out; it is
made of this file by `python tests/stubs.py`, which `make fix` runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.loading import no_collections
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions, build, keywords_of, local_path, written_place
from safeshard.streamer.recheck.written import manifest_of

if TYPE_CHECKING:  # what computes is imported where it is called: the command line's help need not wait for torch
    from safeshard.manifests.verify import Finding
    from safeshard.streamer.run.factors.save_factors import Factors
    from safeshard.streamer.run.result import Result

__all__ = [
    "batch", "calibrate", "finish", "inspect", "lssf", "report", "resta", "ridge", "safedelta", "safelora", "safemerge",
    "scale", "score", "verify",
]  # fmt: skip
P = TypeVar("P", str, "str | os.PathLike[str]")


@keywords_of(METHODS["safemerge"], RunOptions)
def safemerge(**options: Any) -> Result:
    """SafeMERGE: merge with a safe model, by a gate.

    A fine-tuned delta is merged with a safe one where it left the alignment subspace (arXiv 2503.17239).
    Keywords are the fields of `safeshard.streamer.methods.safemerge.SafeMerge` and of `RunOptions`.
    """
    return _run_one("safemerge", options)


@keywords_of(METHODS["safelora"], RunOptions)
def safelora(**options: Any) -> Result:
    """SafeLoRA: project onto the alignment subspace.

    A fine-tuned delta is projected where it points elsewhere (arXiv 2405.16833).
    Keywords are the fields of `safeshard.streamer.methods.safelora.SafeLora` and of `RunOptions`.
    """
    return _run_one("safelora", options)


@keywords_of(METHODS["safedelta"], RunOptions)
def safedelta(**options: Any) -> Result:
    """Safe Delta: keep what a safety budget allows.

    The rest of the fine-tuned delta is reverted, and compensated (arXiv 2505.12038).
    Keywords are the fields of `safeshard.streamer.methods.safedelta.SafeDelta` and of `RunOptions`.
    """
    return _run_one("safedelta", options)


@keywords_of(METHODS["ridge"], RunOptions)
def ridge(**options: Any) -> Result:
    """Ridge: shrink a delta where safe inputs excite it.

    The closed form of what Safe Delta approximates; of a LoRA adapter only A changes.
    Keywords are the fields of `safeshard.streamer.methods.ridge.Ridge` and of `RunOptions`.
    """
    return _run_one("ridge", options)


@keywords_of(METHODS["resta"], RunOptions)
def resta(**options: Any) -> Result:
    """RESTA: add the safety vector, a baseline.

    What alignment once added to the weights is added to the fine-tuned ones (arXiv 2402.11746).
    Keywords are the fields of `safeshard.streamer.methods.resta.Resta` and of `RunOptions`.
    """
    return _run_one("resta", options)


@keywords_of(METHODS["lssf"], RunOptions)
def lssf(**options: Any) -> Result:
    """LSSF: add part of the safety vector, a baseline.

    Of what alignment once added, what lies in the directions that answer safe inputs is added (arXiv 2602.00038).
    Keywords are the fields of `safeshard.streamer.methods.lssf.Lssf` and of `RunOptions`.
    """
    return _run_one("lssf", options)


@keywords_of(Calibrate, RunOptions)
def calibrate(**options: Any) -> Factors:
    """Save Grams and factors for many jobs.

    Returns their folder, and the modules of the aligned model that have no factor.
    Keywords are the fields of `safeshard.streamer.methods.calibrate.Calibrate` and of `RunOptions`.
    """
    from safeshard.streamer.run.factors.save_factors import run_calibrate

    job_options, run_options = _split(options)
    return run_calibrate(build(Calibrate, job_options), run_options)


@keywords_of(METHODS["scale"], RunOptions)
def scale(**options: Any) -> Result:
    """Shrink a fine-tuned delta: the baseline.

    Keywords are the fields of `safeshard.streamer.methods.scale.Scale` and of `RunOptions`.
    """
    return _run_one("scale", options)


@keywords_of(Score, RunOptions)
def score(
    *,
    adapter: str | Sequence[str] = (),
    finetuned: str | Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> list[Result]:
    """Measure how far fine-tuned models strayed.

    Cosines of one or many fine-tuned models in one pass over `aligned` and `unaligned`; writes no model.

    Args:
        adapter, finetuned: one source or several of each.
        output: a .csv or .json file for the table.
        plot: a .svg, .png or .pdf file for a picture of the cosines.
        overwrite: replace existing files.
        options: `aligned`, `unaligned`, and the fields of `RunOptions`.
    """
    with no_collections():
        from safeshard.streamer.run.scores import run_scores

    job_options, run_options = _split(options)
    sources = [{"adapter": s} for s in _listed(adapter)] + [{"finetuned": s} for s in _listed(finetuned)]
    jobs = [build(Score, job_options | source) for source in sources or [{}]]
    table = None if output is None else local_path("--output", output)
    picture = None if plot is None else local_path("--plot", plot)
    return run_scores(jobs, run_options, table, picture, overwrite)


@keywords_of(RunOptions)
def batch(
    jobs: str | os.PathLike[str],
    *,
    keep_going: bool = False,
    skip_finished: bool = False,
    note: Callable[[str], None] = lambda text: None,
    part: str | None = None,
    engine: Literal["local", "ray"] = "local",
    parts: int | None = None,
    **options: Any,
) -> list[Result]:
    """Run the jobs of a YAML file in one pass.

    A checkpoint that jobs share is read once.

    Args:
        jobs: the file; its form is described in `safeshard.streamer.plan.request.jobs_file`.
        keep_going: run what can run although some jobs cannot; `SomeFailedError` then names those, and has the results.
        skip_finished: leave out jobs whose output is finished, whatever it was made of. Without it a finished output is
            passed by only where this very request wrote it, and refused otherwise.
        note: receives how many jobs were left out.
        part: "i/n": do the i-th of n parts of the work, for `finish` to put together; manifests are None.
        engine: "ray" does all parts as tasks of a Ray cluster, and finishes.
        parts: with engine "ray", how many. Default: one a GPU, without GPUs one a node.
        options: the fields of `RunOptions`.
    """
    with no_collections():
        from safeshard.streamer.run.batch import run_batch

    return run_batch(
        Path(jobs), build(RunOptions, options), keep_going=keep_going, skip_finished=skip_finished,
        note=note, part=part, engine=engine, parts=parts,
    )  # fmt: skip


@keywords_of(RunOptions)
def finish(jobs: str | os.PathLike[str], **options: Any) -> list[Result]:
    """Put the parts of a batch together.

    The outputs are those that `batch` writes in one pass. What the numbers of all parts decide is done first.

    Args:
        jobs: the file that the parts were given.
        options: the fields of `RunOptions`.
    """
    with no_collections():
        from safeshard.streamer.plan.request.jobs_file import read_jobs
        from safeshard.streamer.run.parts import gather

    return gather(read_jobs(Path(jobs)), build(RunOptions, options))


def inspect(
    output: str | os.PathLike[str],
    *,
    width: int | None = None,
    color: bool = False,
    plot: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> str:
    """Show the decisions of a finished output.

    A table of layers and modules, and a summary.

    Args:
        width: columns, from which on tables go on below. Default: the terminal's.
        color: paint the decisions by ANSI codes.
        plot: a .svg, .png or .pdf file for a picture of the values by layer.
        overwrite: replace an existing picture.
    """
    from safeshard.manifests.render import render

    manifest = manifest_of(output)
    if plot is not None:
        from safeshard.streamer.run.ending.figures import check_plot, draw_output

        picture = local_path("--plot", plot)
        check_plot(picture, overwrite)
        draw_output(manifest, Path(output).name, picture)
    return render(manifest, width=width, color=color)


def verify(
    output: str | os.PathLike[str],
    *,
    inputs: bool = False,
    recompute: int = 0,
    seed: int = 0,
    sources: Mapping[str, str | os.PathLike[str]] | None = None,
    note: Callable[[str], None] = lambda text: None,
    quiet: bool = True,
) -> list[Finding]:
    """Hash a finished output again.

    Returns what differs from its manifest.

    Args:
        inputs: look at the inputs too: are they what was read?
        recompute: how many modules, chosen by `seed`, to compute again from the inputs. Those that changed are refused.
        sources: role -> place of inputs that have moved, and of those that lie at a URL.
        quiet: show no progress.
        note: receives what is worth knowing and is no difference: what was recomputed, what could not be compared.

    Raises:
        RequestError: no manifest, a URL that the manifest alone names, or inputs to recompute from that changed.
        RunError: recomputing failed underway.
    """
    if recompute < 0:
        raise RequestError(Offence("--recompute", "", "a number from 0 on", str(recompute)))
    from safeshard.streamer.recheck.verified import verified

    places = {role: os.fspath(place) for role, place in (sources or {}).items()}
    return verified(output, inputs=inputs, recompute=recompute, seed=seed, sources=places, note=note, quiet=quiet)


def report(
    output: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    evaluation: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    file: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page about finished outputs.

    One HTML file that needs nothing else; about several outputs it begins with a comparison. Returns where it is.

    Args:
        output: a finished output, or several; or a folder of them, as a batch leaves it.
        evaluation: an evaluation.json, or the folder that `evaluate` wrote, or several, with figures of the outputs.
        file: the .html file (the command's `--output`). Default: `OUT.report.html` beside a single output, in the
            current folder for one afar, and `report.html` there for several.
        overwrite: replace an existing file.
    """
    from safeshard.streamer.recheck.report_file import write_report

    outputs, evaluations = [written_place(each) for each in _listed(output)], [Path(e) for e in _listed(evaluation)]
    return write_report(outputs, evaluations, file, overwrite)


def _run_one(method: str, options: Mapping[str, Any]) -> Result:
    with no_collections():
        from safeshard.streamer.run.runner import run

    job_options, run_options = _split(options)
    return run([build(METHODS[method], job_options)], run_options)[0]


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], RunOptions]:
    ours = RunOptions.model_fields.keys()
    run_options = build(RunOptions, {key: value for key, value in options.items() if key in ours})
    return {key: value for key, value in options.items() if key not in ours}, run_options


def _listed(value: P | Sequence[P]) -> list[P]:
    return [value] if isinstance(value, str | os.PathLike) else list(value)
