"""What gets installed, and the names that others build on."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import safeshard.streamer as streamer
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.options import RunOptions

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_nothing_but_safeshard(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"safeshard"}
    inside = {file for name in ("streamer", "kernels", "manifests", "bench") for file in (ROOT / name).rglob("*.py")}
    sources = {f"safeshard/{file.relative_to(ROOT)}" for file in inside}
    sources |= {f"safeshard/{file.name}" for file in (ROOT / "safeshard").glob("*.py")}
    data = {"streamer/calibration/data/refusals.jsonl", "streamer/plan/jobs.schema.json", "py.typed"}
    data |= {"manifests/manifest.schema.json"}
    assert sources | {f"safeshard/{name}" for name in data} <= set(names)


CONTRACT = {
    "safemerge": "aligned unaligned adapter safe_adapter finetuned safe output dtype "
    "threshold weights combine density rank seed",
    "safelora": "aligned unaligned adapter output dtype threshold num_layers",
    "safedelta": "aligned finetuned adapter calibration factors output dtype strength selection block_size sub_block "
    "percdamp rest samples max_tokens seed output_format rank",
    "scale": "aligned finetuned adapter output dtype factor",
}


@pytest.mark.parametrize("method", CONTRACT)
def test_options_of_the_contract(method: str) -> None:
    assert set(CONTRACT[method].split()) <= METHODS[method].model_fields.keys()


def test_run_options_of_the_contract() -> None:
    names = {"device", "memory", "dry_run", "cache", "cache_budget", "io", "overwrite", "quiet", "strict"}
    assert set(RunOptions.model_fields) == names
    assert {"aligned", "calibration", "output", "samples", "max_tokens", "seed"} <= Calibrate.model_fields.keys()


def test_public_functions() -> None:
    names = [
        "safemerge",
        "safelora",
        "safedelta",
        "calibrate",
        "scale",
        "score",
        "batch",
        "inspect",
        "verify",
        "report",
    ]
    assert set(names) <= set(streamer.__all__)
    assert all(callable(getattr(streamer, name)) for name in names)
