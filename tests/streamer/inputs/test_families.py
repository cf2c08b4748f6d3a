"""The table of families against its documentation, and against what transformers builds."""

from __future__ import annotations

import re
from pathlib import Path

from safeshard.streamer.inputs.layouts import FAMILIES

DOCS = Path(__file__).parents[3] / "docs/experts.md"


def test_the_documentation_names_every_family_under_its_layout() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| fused")]
    documented = {kind: row for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert documented.keys() == FAMILIES.keys()
    for kind, row in documented.items():
        family = FAMILIES[kind]
        assert ("transposed" in row, "in turns" in row) == (family.transposed, family.interleaved), kind
