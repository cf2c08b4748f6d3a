"""Places that are named oddly: links, `..`, home folders, folders where nothing may be written, closed streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safeshard.manifests.errors import RequestError
from safeshard.streamer import batch, calibrate, safemerge, score


@pytest.fixture
def job(world: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A SafeMERGE job without its output; the test's folder is the current one."""
    monkeypatch.chdir(world.root)
    inputs: dict[str, Any] = world.trio()
    return inputs | {"quiet": True}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("target", ["link", "nowhere", "unaligned"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_the_place_of_an_output(job: dict[str, Any], world: Any, target: str, overwrite: bool) -> None:
    """To itself, to nothing, and to a folder: refused before anything is computed, and left alone."""
    Path("link").symlink_to(target)
    before = names(world.root)
    with pytest.raises(RequestError, match=r"--output: link: expected"):
        safemerge(**job, output="link", overwrite=overwrite)
    assert names(world.root) == before
    assert Path("link").readlink() == Path(target)


@pytest.mark.parametrize("output", ["new/..", "/"])
def test_an_output_needs_a_name(job: dict[str, Any], world: Any, output: str) -> None:
    before = names(world.root)
    with pytest.raises(RequestError, match="a folder with a name"):
        safemerge(**job, output=output)
    assert names(world.root) == before


@pytest.mark.parametrize("second", ["link/out", "new/../real/out", "real/out/inside"])
def test_one_output_by_two_names(job: dict[str, Any], world: Any, second: str) -> None:
    Path("real").mkdir()
    Path("link").symlink_to("real")
    options = ", ".join(f"{key}: {value}" for key, value in job.items() if key != "quiet")
    lines = [f"- {{method: safemerge, output: {output}, {options}}}" for output in ("real/out", second)]
    Path("jobs.yaml").write_text("\n".join(["jobs:", *lines]))
    before = names(world.root)
    with pytest.raises(RequestError, match="a folder of its own for each job"):
        batch("jobs.yaml")
    assert names(world.root) == before


def test_a_folder_without_the_right_to_write(job: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the plan, a dry run included; root, as whom tests may run, has every right."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    before = names(world.root)
    for dry_run in (False, True):
        with pytest.raises(RequestError, match="no right to write"):
            safemerge(**job, output="out", dry_run=dry_run)
    with pytest.raises(RequestError, match="no right to write"):
        calibrate(aligned=job["aligned"], output="out")
    assert names(world.root) == before


def test_factors_go_apart_from_the_model(job: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="apart from the inputs"):
        calibrate(aligned=job["aligned"], output=job["aligned"] / "factors")


def test_a_home_folder(job: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--output=~/out` alone, and so does YAML: no folder named ~ comes of it."""
    monkeypatch.setenv("HOME", str(world.root))
    result = safemerge(**job | {"adapter": "~/adapter"}, output="~/out")
    assert result.output == world.root / "out"
    assert result.manifest is not None
    assert result.manifest.inputs["adapter"].source == str(world.root / "adapter")
    score(aligned="~/aligned", unaligned=Path("~/unaligned"), adapter="~/adapter", output="~/s.csv", quiet=True)
    assert (world.root / "s.csv").is_file()
    assert not Path("~").exists()


def test_an_empty_place_is_one_offence(job: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        safemerge(**job | {"adapter": ""}, output="out")
    assert str(refused.value) == "--adapter: expected a place, got ''"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_harm_nothing(job: dict[str, Any], world: Any, closed: str) -> None:
    words = [sys.executable, "-m", "safeshard", "safemerge", "--output", "out"]
    for name, value in job.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if name != "quiet" else []
    ended = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert all(line.startswith("safeshard: warning: ") for line in ended.stderr.splitlines())
    assert Path("out/manifest.json").is_file()


def test_notes_come_in_the_order_of_the_model(job: dict[str, Any], world: Any) -> None:
    """Sets of names are iterated in an order that differs from process to process."""
    name = "model.layers.0.mlp.up_proj.weight"
    few = world.adapter("few", {name: world.llama()[name]}, target_modules=["up_proj"], layers_to_transform=[0])
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    others = [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds]
    others.remove(name.removesuffix(".weight"))
    for role, given in (("adapter", {"safe_adapter": few}), ("safe_adapter", {"adapter": few})):
        result = safemerge(**job | given, output=f"without-{role}")
        assert result.manifest is not None
        assert [f.subject for f in result.manifest.fallbacks] == others
