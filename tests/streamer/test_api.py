"""The public functions as callers, type checkers and editors see them."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path

import pytest

import safeshard
from safeshard.streamer import api
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.methods.score import Score
from safeshard.streamer.options import RunOptions

ROOT = Path(__file__).parents[2]


def test_the_stub_says_what_the_options_are() -> None:
    """Regenerate it with `python tests/stubs.py`."""
    made = subprocess.run(
        [sys.executable, "-c", "import stubs; print(stubs.text(), end='')"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    ).stdout  # fmt: skip
    assert (ROOT / "streamer/api.pyi").read_text() == made


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_the_fields_of_its_options(method: str) -> None:
    shown = signature(getattr(safeshard, method)).parameters
    fields = METHODS[method].model_fields | RunOptions.model_fields
    assert shown.keys() == fields.keys()
    assert all(p.kind is Parameter.KEYWORD_ONLY for p in shown.values())
    for name, field in fields.items():
        assert shown[name].default == (Parameter.empty if field.is_required() else field.default), name


@pytest.mark.parametrize("name", ["safemerge", "ridge", "calibrate", "score", "batch"])
def test_help_says_what_each_keyword_means(name: str) -> None:
    """As the command line does, and once; what is this function's own is described in its own words."""
    doc = " ".join((getattr(safeshard, name).__doc__ or "").split())
    model = {**METHODS, "calibrate": Calibrate, "score": Score}.get(name)
    described = (model.model_fields if model else {}) | RunOptions.model_fields
    own = {"score": {"adapter", "finetuned", "output", "overwrite"}}.get(name, set())
    assert doc.count("Args: ") == 1
    for option, field in described.items():
        if option not in own:
            assert doc.count(f" {option}: {field.description}.") == 1, option
    assert "options: " not in doc


def test_all_public_functions_are_there() -> None:
    assert set(api.__all__) < set(safeshard.__all__)
    assert all(callable(getattr(safeshard, name)) for name in api.__all__)


@pytest.mark.slow
def test_a_misspelt_keyword_is_an_error_of_mypy(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
from pathlib import Path
import safeshard
safeshard.safemerge(aligned="a", unaligned=Path("u"), adapter="x", safe_adapter="s", output="o", memory="2GiB")
safeshard.safemerge(aligned="a", unaligned="u", output="o", thresold=3)
safeshard.scale(aligned="a", output="o", factor="half")
reveal_type(safeshard.safelora)
""")
    settings = tmp_path / "mypy.ini"  # without what torch and its likes import: `make check` reads that
    settings.write_text("[mypy]\n[mypy-torch.*,transformers.*,numpy.*,pydantic.*]\nfollow_imports = skip\n")
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path), str(program)]
    typing = ROOT / ".venv/typing"
    if not (typing / "safeshard").exists():
        pytest.skip("the links that `make` lays for mypy are not there")
    done = subprocess.run(
        mypy, capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(typing)}, cwd=tmp_path
    )
    errors = [line for line in done.stdout.splitlines() if line.startswith("program.py") and "error:" in line]
    assert [("thresold" in e, "factor" in e) for e in errors] == [(True, False), (False, True)], done.stdout
    assert "num_layers" in done.stdout  # what an editor shows of it
