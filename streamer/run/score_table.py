"""Scores as a file: cosines by fine-tuned model and module."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from safeshard.streamer.run.runner import Result


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
