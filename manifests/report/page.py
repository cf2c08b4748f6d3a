"""The whole page: a comparison of several outputs, and a part for each. It holds no script, and all that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from safeshard.manifests.evaluation import Evaluation
from safeshard.manifests.report.compare import compared, row_of
from safeshard.manifests.report.evaluations import grouped
from safeshard.manifests.report.markup import rendered
from safeshard.manifests.report.output import output_of
from safeshard.manifests.schema import Manifest

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(outputs: Iterable[tuple[str, Manifest]], evaluations: Sequence[Evaluation] = ()) -> str:
    """HTML about outputs, each given by a title and its manifest; of several, a comparison comes first.

    Manifests are taken one at a time. Of each only so many rows and cells are shown, whatever its size. Figures of
    `evaluations` are shown with the outputs whose manifests they name.
    """
    measured = grouped(evaluations)
    rows, sections, titles = [], [], []
    for number, (title, manifest) in enumerate(outputs, 1):
        figures = [(each.suite, each.outputs.get(manifest.blake3 or "", [])) for each in measured]
        found = output_of(title, manifest, figures)
        titles.append(title)
        rows.append(row_of(number, found))
        sections.append(rendered("output.html", output=found, number=number))  # and the manifest is forgotten
    several = len(rows) != 1
    html = rendered(
        "page.html", policy=POLICY, title=f"{len(rows)} outputs" if several else titles[0], sections=sections,
        comparison=compared(rows, measured) if several else None,
    )  # fmt: skip
    return f"{html}\n"
