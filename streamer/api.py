"""The public functions: the commands, callable."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.render import render
from safeshard.manifests.schema import load
from safeshard.manifests.verify import Finding
from safeshard.manifests.verify import verify as verify_output
from safeshard.streamer.jobs_file import read_jobs
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions, build
from safeshard.streamer.run import Result, run
from safeshard.streamer.save_factors import Calibrate, Factors, run_calibrate


def safemerge(**options: Any) -> Result:
    """Merge a fine-tuned adapter with a safe one where it left the alignment subspace (SafeMERGE, arXiv 2503.17239).

    Keywords are the fields of `safeshard.streamer.methods.safemerge.SafeMerge` and of `RunOptions`.
    """
    return _run_one("safemerge", options)


def safelora(**options: Any) -> Result:
    """Project a fine-tuned delta onto the alignment subspace (SafeLoRA, arXiv 2405.16833).

    Keywords are the fields of `safeshard.streamer.methods.safelora.SafeLora` and of `RunOptions`.
    """
    return _run_one("safelora", options)


def safedelta(**options: Any) -> Result:
    """Keep of a fine-tuned delta what a safety budget allows and compensate the rest (Safe Delta, arXiv 2505.12038).

    Keywords are the fields of `safeshard.streamer.methods.safedelta.SafeDelta` and of `RunOptions`.
    """
    return _run_one("safedelta", options)


def calibrate(**options: Any) -> Factors:
    """Save the factors of an aligned model, for reuse by Safe Delta jobs; return their folder, and what has none.

    Keywords are the fields of `safeshard.streamer.save_factors.Calibrate` and of `RunOptions`.
    """
    job_options, run_options = _split(options)
    return run_calibrate(build(Calibrate, job_options), run_options)


def scale(**options: Any) -> Result:
    """Shrink a fine-tuned delta by a factor: the baseline.

    Keywords are the fields of `safeshard.streamer.methods.scale.Scale` and of `RunOptions`.
    """
    return _run_one("scale", options)


def score(
    *,
    adapter: str | Sequence[str] = (),
    finetuned: str | Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> list[Result]:
    """Cosines of one or many fine-tuned models in one pass over `aligned` and `unaligned`; writes no model.

    Args:
        adapter, finetuned: one source or several of each.
        output: a .csv or .json file for the table.
        options: `aligned`, `unaligned`, and the fields of `RunOptions`.
    """
    table = Path(output) if output is not None else None
    if table is not None and table.suffix not in (".csv", ".json"):
        raise RequestError(Offence("--output", str(table), "a .csv or .json file", table.suffix or "no suffix"))
    if table is not None and table.exists() and not overwrite:
        raise RequestError(
            Offence("--output", str(table), "a file that does not exist", "it exists", "choose another, or --overwrite")
        )
    job_options, run_options = _split(options)
    sources = [{"adapter": s} for s in _listed(adapter)] + [{"finetuned": s} for s in _listed(finetuned)]
    jobs = [build(Score, job_options | source) for source in sources or [{}]]
    results = run(jobs, run_options)
    if table is not None and not run_options.dry_run:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(score_table(results, table.suffix))
    return results


def score_table(results: Sequence[Result], suffix: str) -> str:
    """Scores as CSV (columns source, module, cosine) or as JSON ({source: {module: cosine}})."""
    cosines = {str(r.job.adapter or r.job.finetuned): r.cosines for r in results}
    if suffix == ".json":
        return json.dumps(cosines, indent=2) + "\n"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["source", "module", "cosine"])
    rows.writerows((source, name, c) for source, scores in cosines.items() for name, c in scores.items())
    return text.getvalue()


def batch(jobs: str | os.PathLike[str], **options: Any) -> list[Result]:
    """Run all jobs of a YAML file in one pass over the checkpoints they share.

    Args:
        jobs: the file; its form is described in `safeshard.streamer.jobs_file`.
        options: the fields of `RunOptions`.
    """
    return run(read_jobs(Path(jobs)), build(RunOptions, options))


def inspect(output: str | os.PathLike[str], *, width: int | None = None, color: bool = False) -> str:
    """The decisions of a finished output as a table."""
    return render(load(Path(output)), width=width, color=color)


def verify(output: str | os.PathLike[str]) -> list[Finding]:
    """Hash a finished output again; return what differs from its manifest."""
    return verify_output(Path(output))


def _run_one(method: str, options: Mapping[str, Any]) -> Result:
    job_options, run_options = _split(options)
    return run([build(METHODS[method], job_options)], run_options)[0]


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], RunOptions]:
    ours = RunOptions.model_fields.keys()
    run_options = build(RunOptions, {key: value for key, value in options.items() if key in ours})
    return {key: value for key, value in options.items() if key not in ours}, run_options


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str | os.PathLike) else list(value)
