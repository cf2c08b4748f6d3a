"""`score`: cosines by fine-tuned model and module, also as a table and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from safeshard.streamer.disk import check_file, replace_file
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions
from safeshard.streamer.run.ending.figures import check_plot, draw_values
from safeshard.streamer.run.result import Result
from safeshard.streamer.run.runner import run


def run_scores(
    jobs: Sequence[Score], options: RunOptions, table: Path | None, picture: Path | None, overwrite: bool
) -> list[Result]:
    """Score models in one pass, and write what was asked for of it; see `safeshard.score`."""
    if table is not None:
        check_file(table, (".csv", ".json"), overwrite)
    if picture is not None:
        check_plot(picture, overwrite)
    results = run(jobs, options)
    if table is not None and not options.dry_run:
        replace_file(table, score_table(results, table.suffix).encode(errors="backslashreplace"))
    if picture is not None and not options.dry_run:
        draw_values({r.plan.finetuned.source.spec: r.cosines for r in results}, "cosine", picture)
    return results


def score_table(results: Sequence[Result], suffix: str) -> str:
    """Scores as CSV (columns source, module, cosine) or as JSON ({source: {module: cosine}})."""
    cosines = {r.plan.finetuned.source.spec: r.cosines for r in results}
    if suffix == ".json":
        return json.dumps(cosines, indent=2) + "\n"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["source", "module", "cosine"])
    rows.writerows(
        (_plain_cell(source), _plain_cell(name), c) for source, scores in cosines.items() for name, c in scores.items()
    )
    return text.getvalue()


def _plain_cell(text: str) -> str:
    """A name that spreadsheets do not take for a formula: they show what follows an apostrophe as text."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
