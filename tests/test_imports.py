"""What no file may do. The order of folders and rooms is import-linter's: see pyproject.toml and `make check`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "manifests", "streamer", "bench", "safeshard")


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_pickle_and_no_remote_code() -> None:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            assert not {name.partition(".")[0] for name in imported(file)} & {"pickle", "dill", "cloudpickle", "joblib"}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    remote = [k for k in node.keywords if k.arg == "trust_remote_code"]
                    assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in remote), file
                    called = ast.unparse(node.func)
                    assert called not in ("torch.load", "eval", "exec"), f"{file}: {called}"
