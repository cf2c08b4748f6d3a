"""Where there is no Triton, as on macOS: everything loads, and the torch implementations run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(f"no module named {name}")

sys.meta_path.insert(0, Hide())
from safeshard.kernels import backend, lang
from safeshard.streamer import api

assert not lang.has_triton()
inputs = sys.argv[1]
common = {"aligned": f"{inputs}/aligned", "quiet": True, "device": "cpu"}
adapter = common | {"adapter": f"{inputs}/adapter", "unaligned": f"{inputs}/unaligned"}
results = [
    api.safemerge(**adapter, safe_adapter=f"{inputs}/safe-adapter", threshold=0.5, output="merge"),
    api.safelora(**adapter, threshold=0.5, output="project"),
    api.safelora(**adapter | {"adapter": None, "finetuned": f"{inputs}/finetuned"}, threshold=0.5, output="whole"),
    api.safedelta(**common, adapter=f"{inputs}/adapter", calibration=f"{inputs}/data.jsonl", samples=2, output="delta"),
]
assert all(api.verify(result.output) == [] for result in results)
try:
    import torch
    backend.resolve("triton", torch.zeros(1))
except ValueError as error:
    assert "needs Triton" in str(error)
else:
    raise AssertionError
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
"""


def test_all_methods_run_without_triton(tmp_path: Path) -> None:
    inputs = Path(__file__).parent.parent / "pins/written/0.1.0/inputs"
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(inputs)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
