"""No thread of a job is the first to call a function of numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safeshard.kernels
import safeshard.streamer
from safeshard.kernels.ground import first_calls

NAMES = {function.__name__ for function in first_calls.FUNCTIONS}
RECORDED = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            print(func.overloadpacket.__name__, str(args[0].dtype)[6:])
        return func(*args, **kwargs or {})

with Calls():
    import MODULE
"""


def users() -> Iterator[tuple[str, str]]:
    """Modules that call such a function of tensors, and what is in them."""
    for room in (safeshard.kernels, safeshard.streamer):
        folder = Path(str(room.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            called = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            named = [f for f in called if isinstance(f, ast.Attribute) and f.attr.rstrip("_") in NAMES]
            if any(not (isinstance(f.value, ast.Name) and f.value.id in ("math", "tl")) for f in named):
                yield str(path.relative_to(folder.parent)), path.read_text()


def test_who_calls_one_imports_their_first_calls() -> None:
    found = dict(users())
    assert "kernels/alignment/cosine.py" in found
    assert [path for path, text in found.items() if "ground.first_calls" not in text and "FUNCTIONS" not in text] == []


@pytest.mark.parametrize("module", ["safeshard.kernels.gate", "safeshard.streamer.calibration.model.running"])
def test_each_is_called_as_that_is_imported(module: str) -> None:
    script = RECORDED.replace("MODULE", module)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    calls = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert {(name, dtype) for name in NAMES for dtype in ("float32", "float64")} <= calls
