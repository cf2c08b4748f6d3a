"""Imports go one way: bench -> streamer -> {kernels, manifests}; manifests know nothing of torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "manifests": {"manifests"},
    "streamer": {"streamer", "kernels", "manifests"},
    "bench": {"bench", "streamer", "kernels", "manifests"},
}


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            top, _, rest = name.partition(".")
            assert top not in MAY_IMPORT, f"{file.name} imports {name} by its folder, not as safeshard.{name}"
            if top == "safeshard":
                assert rest.split(".")[0] in MAY_IMPORT[package], f"{file.name} imports {name}"


def test_manifests_need_no_torch() -> None:
    for file in (ROOT / "manifests").rglob("*.py"):
        heavy = {name.partition(".")[0] for name in imported(file)} & {"torch", "numpy", "triton", "safetensors"}
        assert not heavy, f"{file.name} imports {heavy}"


def test_no_pickle_and_no_remote_code() -> None:
    for package in MAY_IMPORT:
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            assert not {name.partition(".")[0] for name in imported(file)} & {"pickle", "dill", "cloudpickle", "joblib"}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    remote = [k for k in node.keywords if k.arg == "trust_remote_code"]
                    assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in remote), file
                    called = ast.unparse(node.func)
                    assert called not in ("torch.load", "eval", "exec"), f"{file}: {called}"
