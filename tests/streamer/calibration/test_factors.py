"""Saved factors: the same bytes as calibrating in place, and refused wherever they do not belong or were changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeshard.kernels.calibrated.factor import NotPositiveDefiniteError
from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import calibrate, safedelta
from safeshard.streamer.calibration import factors, groups
from safeshard.streamer.cli.app import main
from safeshard.streamer.run.factors.save_factors import Factors

MODULES = 7 * 3  # of the golden Llama


class Place:
    """A golden Llama with its calibration data, and the commands on it."""

    def __init__(self, root: Path, golden: Path) -> None:
        self.root, self.golden = root, golden
        tokens = json.loads((golden / "expected/safedelta.json").read_text())["tokens"]
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
        self.samples = len(tokens)

    def calibrate(self, out: str = "factors", **options: Any) -> Factors:
        defaults = {"aligned": self.golden / "aligned", "calibration": self.data, "samples": self.samples}
        return calibrate(**defaults | {"output": self.root / out, "quiet": True} | options)

    def safedelta(self, out: str, **options: Any) -> dict[str, bytes]:
        """The bytes of the output's safetensors files."""
        inputs: dict[str, Any] = {"aligned": self.golden / "aligned", "adapter": self.golden / "ft-adapter"}
        if "factors" not in options:
            inputs |= {"calibration": self.data, "samples": self.samples}
        if "finetuned" in options:
            del inputs["adapter"]
        safedelta(**inputs | {"output": self.root / out, "block_size": 48, "strength": 2.0, "quiet": True} | options)
        return {path.name: path.read_bytes() for path in (self.root / out).glob("*.safetensors")}

    def edit_index(self, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.root / "factors/factors.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}


@pytest.fixture
def place(tmp_path: Path, golden: Any) -> Place:
    return Place(tmp_path, golden("llama"))


@pytest.fixture
def saved(place: Place) -> Place:
    place.calibrate()
    return place


def run_cli(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit status and stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    return (stop.value.code if isinstance(stop.value.code, int) else 0), capsys.readouterr().err


@pytest.mark.parametrize("kind", ["adapter", "finetuned"])
def test_saved_factors_give_the_same_bytes(saved: Place, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    options = {"finetuned": saved.golden / "finetuned"} if kind == "finetuned" else {}
    expected = saved.safedelta("in-place", **options)
    monkeypatch.setattr(factors, "calibrate", None)  # nothing runs
    assert saved.safedelta("with-factors", factors=saved.root / "factors", **options) == expected
    manifest = json.loads((saved.root / "with-factors/manifest.json").read_text())
    assert manifest["inputs"].keys() >= {"factors", "calibration"}
    assert manifest["inputs"]["calibration"]["files"][0]["name"] == "data.jsonl"
    assert not {"samples", "seed", "percdamp"} & manifest["method"]["options"].keys()


def test_what_is_saved(saved: Place) -> None:
    """One factor for each distinct input: U upper triangular with U^T U the inverse of the damped golden Hessian."""
    shutil.rmtree(saved.root / "factors")
    saved.calibrate(dtype="float32", percdamp=0.1)
    index = json.loads((saved.root / "factors/factors.json").read_text())
    assert [len(layer) for layer in index["layers"]] == [4, 4, 4]
    assert index["options"] == {
        "recipe": None,
        "samples": saved.samples,
        "max_tokens": 512,
        "seed": 0,
        "percdamp": 0.1,
        "dtype": "float32",
        "save": "both",
    }
    hessians = load_file(saved.golden / "expected/safedelta-hessians.safetensors")
    seen = set()
    for layer in index["layers"]:
        for group in layer:
            u = load_file(saved.root / "factors" / group["file"])[group["tensor"]].double()
            assert torch.equal(u, u.triu())
            for module in group["modules"]:
                gram = next(t for name, t in hessians.items() if name.removesuffix(".weight") == module).double()
                gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
                inverse = torch.linalg.inv(gram)
                assert (u.T @ u - inverse).norm() <= 1e-4 * inverse.norm(), module
                seen.add(module)
    assert len(seen) == MODULES


def test_factors_of_another_model_are_refused(saved: Place) -> None:
    """Also where the headers are the same, and where only one linear of the first layer differs."""
    other = saved.golden / "unaligned"
    with pytest.raises(RequestError, match=r"weights differ.*calibrate this model") as refused:
        saved.safedelta("out", aligned=other, factors=saved.root / "factors")
    assert str(other) in str(refused.value)
    tensors = load_file(saved.golden / "aligned/model.safetensors")
    merged = tensors | {name: t * 1.5 for name, t in tensors.items() if "layers.0.self_attn.v_proj" in name}
    save_file(merged, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match="weights differ"):
        saved.safedelta("out", aligned=other, factors=saved.root / "factors")
    save_file({name: t.float() for name, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match="headers differ"):
        saved.safedelta("out", aligned=other, factors=saved.root / "factors")


def test_a_flipped_byte_is_noticed(saved: Place, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved.root / "factors/factors-00001.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(place["data_offsets"][1] for name, place in header.items() if name[0] != "_" and ":" not in name)
    data[8 + length + end - 20] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        RunError, match=r"factors-00001\.safetensors: model\.layers\.1\.\S+ is not what calibrate wrote"
    ):
        saved.safedelta("out", factors=saved.root / "factors")


def test_a_missing_file_is_refused(saved: Place) -> None:
    (saved.root / "factors/factors-00002.safetensors").unlink()
    with pytest.raises(RequestError, match=r"factors-00002\.safetensors"):
        saved.safedelta("out", factors=saved.root / "factors")
    with pytest.raises(RequestError, match=r"factors\.json"):
        saved.safedelta("out", factors=saved.golden / "aligned")


def rename_tensor(index: dict[str, Any]) -> None:
    index["layers"][0][0]["tensor"] = "elsewhere"


def name_unknown_module(index: dict[str, Any]) -> None:
    index["layers"][0][0]["modules"].append("model.layers.9.mlp.up_proj")


def name_module_twice(index: dict[str, Any]) -> None:
    index["layers"][1].append(index["layers"][0][0])


def take_another_width(index: dict[str, Any]) -> None:
    wide = next(group for group in index["layers"][0] if "down_proj" in group["modules"][0])
    index["layers"][0][0]["tensor"] = wide["tensor"]


def leave_the_folder(index: dict[str, Any]) -> None:
    index["layers"][0][0]["file"] = "../factors-00000.safetensors"


def add_key(index: dict[str, Any]) -> None:
    index["surprise"] = 1


def empty_group(index: dict[str, Any]) -> None:
    index["layers"][0][0]["modules"] = []


def other_schema(index: dict[str, Any]) -> None:
    index["schema"] = "safeshard.factors/4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_tensor, "no such tensor"),
        (name_unknown_module, r"model\.layers\.9\.mlp\.up_proj"),
        (name_module_twice, "once"),
        (take_another_width, r"F32 \[64, 64\]"),
        (leave_the_folder, r"layers\.0\.0\.file"),
        (add_key, "surprise"),
        (empty_group, r"layers\.0\.0\.modules"),
        (other_schema, "schema"),
    ],
)
def test_a_malformed_index_is_refused(saved: Place, change: Callable[[dict[str, Any]], None], message: str) -> None:
    saved.edit_index(change)
    with pytest.raises(RequestError, match=message):
        saved.safedelta("out", factors=saved.root / "factors")
    assert not saved.names() & {"out", "out.partial"}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"schema": "safeshard.factors/1"}'])
def test_an_index_that_is_none(saved: Place, text: str) -> None:
    (saved.root / "factors/factors.json").write_text(text)
    with pytest.raises(RequestError, match=r"factors\.json"):
        saved.safedelta("out", factors=saved.root / "factors")


def test_what_has_no_factor(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`calibrate` says which, exits with 1, and jobs with these factors keep the modules aligned."""
    original = groups.safety_factor

    def refuse(gram: torch.Tensor, percdamp: float) -> Any:
        if len(gram) == 64:
            return original(gram, percdamp)
        raise NotPositiveDefiniteError("not positive definite with damping 0.01, 0.1, 1")

    monkeypatch.setattr(groups, "safety_factor", refuse)
    out = place.root / "factors"
    status, err = run_cli(
        capsys, "calibrate", "--aligned", place.golden / "aligned", "--calibration", place.data, "--samples",
        place.samples, "--output", out,
    )  # fmt: skip
    assert status == 1
    reverted = {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    assert all(f"{name}: its Gram matrix has no factor: not positive definite" in err for name in reverted)
    expected = place.safedelta("in-place")
    monkeypatch.undo()
    assert place.safedelta("with-factors", factors=out) == expected
    manifest = json.loads((place.root / "with-factors/manifest.json").read_text())
    assert {entry["name"] for entry in manifest["modules"] if entry["decision"] == "reverted"} == reverted


def test_a_dry_run_says_what_factors_take(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {n: t for f in (place.golden / "aligned").glob("*.safetensors") for n, t in load_file(f).items()}
    widths = [weight.shape[1] for name, weight in weights.items() if "_proj." in name]
    halves = [sum(min(128, w - lo) * (w - lo) for lo in range(0, w, 128)) for w in widths]  # Grams, by panels of rows
    nbytes = sum(4 * (width**2 + half) for width, half in zip(widths, halves, strict=True))
    with pytest.raises(SystemExit):
        main(["calibrate", "--aligned", str(place.golden / "aligned"), "--calibration", str(place.data), "--samples",
              str(place.samples), "--output", str(place.root / "out"), "--dry-run", "--json"])  # fmt: skip
    printed = capsys.readouterr()  # with --json prose goes to stderr
    said = printed.err.splitlines()
    assert json.loads(printed.out)["bytes_to_write"] == nbytes
    assert f"to write at most {nbytes / 1e6:.2f} MB" in said[1]
    assert said[-1] == "dry run: nothing was written"
    assert not list(place.root.glob("out*"))


def test_places(place: Place) -> None:
    """Nothing of others is overwritten, nothing is left behind, and what is ours is replaced only when asked."""
    before = place.names()
    place.calibrate(dry_run=True)
    assert place.names() == before
    with pytest.raises(RequestError, match="at least"):
        place.calibrate(memory="64KiB")
    assert place.names() == before
    place.calibrate()
    with pytest.raises(RequestError, match="--overwrite"):
        place.calibrate()
    place.calibrate(overwrite=True, percdamp=0.1)
    assert json.loads((place.root / "factors/factors.json").read_text())["options"]["percdamp"] == 0.1
    assert place.names() == before | {"factors"}
    for name in ("theirs", "other.partial"):
        (place.root / name).mkdir()
        (place.root / name / "thesis.txt").write_text("precious")
        with pytest.raises(RequestError, match="did not write"):
            place.calibrate(name.removesuffix(".partial"), overwrite=True)
        assert (place.root / name / "thesis.txt").read_text() == "precious"


def test_what_fails_underway_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RunError("a sudden end")

    monkeypatch.setattr(groups, "safety_factor", fail)
    before = place.names()
    with pytest.raises(RunError, match="a sudden end"):
        place.calibrate()
    assert place.names() == before


def test_the_built_in_data_needs_a_tokenizer(place: Place) -> None:
    with pytest.raises(RequestError, match="tokenizer") as refused:
        calibrate(aligned=place.golden / "aligned", output=place.root / "out", samples=1)
    assert str(place.golden / "aligned") in str(refused.value)
