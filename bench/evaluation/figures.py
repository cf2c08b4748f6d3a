"""From verdicts to figures, and from figures to tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from safeshard.bench.evaluation.graders.base import Verdict
from safeshard.bench.evaluation.graders.coherence import is_incoherent
from safeshard.bench.evaluation.intervals import interval
from safeshard.bench.evaluation.suite import Part, Suite
from safeshard.manifests.errors import printable
from safeshard.manifests.evaluation import MEASURES, Evaluation, Figure, percent
from safeshard.manifests.terminal import grid


def figure(model: str, suite: Suite, part: Part, answers: Sequence[str], verdicts: Sequence[Verdict]) -> Figure:
    """What one part says about one model."""
    assert part.prompts is not None
    assert part.grader is not None
    known = [verdict.value for verdict in verdicts if verdict.value is not None]
    value, low, high = interval(known, len(verdicts) - len(known))
    sampling = suite.sampling_of(part)
    return Figure(
        model=model, part=part.name, measure=part.measures, value=value if known else None, low=low, high=high,
        prompts=len(answers), ungraded=len(verdicts) - len(known),
        incoherent=sum(map(is_incoherent, answers)) / len(answers), source=part.prompts.source,
        grader=part.grader.label, sampling=sampling.label, max_tokens=sampling.max_tokens,
    )  # fmt: skip


HEADS = (
    "model", "part", "measure", "%", "95 % interval", "prompts", "not graded", "incoherent %", "prompts from", "grader",
    "sampling", "tokens",
)  # fmt: skip


def cells(figure: Figure) -> list[str]:
    """A row of a table for people."""
    return [
        figure.model, figure.part, MEASURES[figure.measure], percent(figure.value),
        f"{percent(figure.low)} to {percent(figure.high)}", str(figure.prompts), str(figure.ungraded or ""),
        percent(figure.incoherent), figure.source, figure.grader, figure.sampling, str(figure.max_tokens or ""),
    ]  # fmt: skip


def markdown(evaluation: Evaluation) -> str:
    """All figures as a Markdown table."""
    lines = [list(HEADS), ["---"] * len(HEADS), *map(cells, evaluation.figures)]
    return "".join(f"| {' | '.join(printable(c).replace('|', '&#124;') for c in line)} |\n" for line in lines)


def text(evaluation: Evaluation, color: bool = False) -> str:
    """All figures as a table for a terminal, the columns that say nothing left out."""
    rows = [*map(cells, evaluation.figures)]
    kept = [n for n in range(len(HEADS)) if any(row[n] for row in rows)]
    shown = ([printable(row[n], 60) for n in kept] for row in rows)
    return grid([HEADS[n] for n in kept], shown, color, left=len(kept))


def csv_table(evaluation: Evaluation) -> str:
    """All figures as CSV, shares between 0 and 1."""
    out = io.StringIO()
    table = csv.DictWriter(out, list(Figure.model_fields), lineterminator="\n")
    table.writeheader()
    for each in evaluation.figures:
        table.writerow({k: _plain(v) for k, v in each.model_dump().items()})
    return out.getvalue()


def _plain(value: object) -> object:
    """Text that spreadsheets do not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
