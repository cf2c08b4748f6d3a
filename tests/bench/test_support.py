"""The support table says what the planner does, cell by cell, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeshard.bench.inputs.support import COLUMNS, KINDS, NONE, NOTED, REFUSED, YES, Kind, markdown, planned
from safeshard.bench.inputs.support_inputs import BUILDERS, Inputs
from safeshard.bench.inputs.support_planned import gate_outcomes, plan_kind

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_planner_does_what_the_table_says(tmp_path: Path, kind: Kind) -> None:
    """Where it says something else, `safeshard bench support` makes the table anew."""
    assert plan_kind(kind.name, tmp_path) == planned()[kind.name]


@pytest.mark.parametrize("name", ["llama", "twins", "trained_head", "towers", "padded_base", "dora"])
def test_the_gate_s_column_stands_for_methods_without_one(tmp_path: Path, name: str) -> None:
    it = Inputs(tmp_path, "llama")
    BUILDERS[name](it)
    cell = planned()[name]["gate_adapter"]
    for _, outcome in gate_outcomes(it.write(), tmp_path / "out"):
        assert (outcome == REFUSED) == (cell == REFUSED)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_tests_that_a_row_names_are_there(kind: Kind) -> None:
    row = planned()[kind.name]
    assert tuple(row) == COLUMNS
    assert set(row.values()) <= {YES, NOTED, REFUSED, NONE}
    assert kind.tests
    for named in kind.tests:
        file, _, function = named.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), named


def test_every_row_has_its_builder() -> None:
    assert {kind.name for kind in KINDS} == BUILDERS.keys() == planned().keys()
    assert markdown().count("\n") == len(KINDS) + 2
