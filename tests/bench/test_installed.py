"""Commands of an installed package, without a checkout around it and without extras."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from safeshard.bench import rows
from safeshard.bench.pages import documents

WITHOUT = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {missing!r} else found(name, package)
from safeshard.streamer.cli.app import main
main({command!r})
"""


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        (["demo", "--quick"], {"peft"}, "bench"),
        (["demo", "--small"], {"transformers"}, "bench"),
        (["demo", "--quick"], {"matplotlib"}, "report"),
        (["bench", "toy", "--seeds", "1"], {"transformers"}, "bench"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(
    command: list[str], missing: set[str], extra: str, tmp_path: Path
) -> None:
    program = WITHOUT.format(missing=missing, command=command)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert f"safeshard[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_rows_of_an_installed_package_go_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not into site-packages; and no document there is made anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "IN_CHECKOUT", False)
    monkeypatch.setattr(rows, "RESULTS", Path("bench-results"))
    rows.append("io", {"what": "nothing"})
    assert (tmp_path / "bench-results/io.csv").is_file()
    assert rows.read("io")[0]["commit"] == "unknown"
    assert documents.documents() == []


def test_a_report_without_rows_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "safeshard", "bench", "--results", str(tmp_path / "none"), "report"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "measure something first" in done.stderr
