"""LSSF end to end against the dense formula in fp64, with Grams computed apart from the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safeshard import kernels
from safeshard.manifests.errors import RequestError
from safeshard.manifests.schema import Manifest
from safeshard.streamer import batch, calibrate, lssf, verify
from safeshard.streamer.cli.app import main
from safeshard.streamer.run.result import Result

ENTROPY = 0.5


def options(it: Any, out: str, **given: Any) -> dict[str, Any]:
    unaligned = it.root / "unaligned"
    if not unaligned.exists():
        torch.manual_seed(11)
        it.write("unaligned", {name: t + 0.02 * torch.randn_like(t) for name, t in it.aligned.items()})
    common = {k: v for k, v in it.options(out, **given).items() if k not in ("block_size", "sub_block", "percdamp")}
    return {"unaligned": unaligned, "entropy": ENTROPY} | common


def manifest_of(result: Result) -> Manifest:
    assert result.manifest is not None
    return result.manifest


def run(it: Any, out: str, **given: Any) -> tuple[Manifest, dict[str, Tensor]]:
    return manifest_of(lssf(**options(it, out, **given))), it.tensors(out)


def added(it: Any, module: str, most: int | None = None) -> tuple[Tensor, int]:
    """U U^T (W_aligned - W_unaligned) of a module by the definition, in fp64, and how many directions U has."""
    unaligned = load_file(it.root / "unaligned/model.safetensors")
    weight = it.weight(it.aligned, module).double()
    values, vectors = torch.linalg.eigh(weight @ it.grams[module] @ weight.T)
    p = values.flip(0).clamp_min(0) / values.sum()
    held = torch.where(p > 0, -p * p.log(), 0.0).cumsum(0)
    count = int((held < ENTROPY * held[-1]).sum()) + 1
    u = vectors.flip(1)[:, : count if most is None else min(count, most)]
    return u @ (u.T @ (weight - it.weight(unaligned, module).double())), count


def assert_near(got: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    """The forward pass in fp32 decides how well the tiny models' Grams are known."""
    assert (got - expected).norm() <= 2e-4 * expected.norm() + rounding


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("most", [None, 2])
def test_adapter(case: Any, tmp_path: Path, kind: str, most: int | None) -> None:
    """The rank grows by as many directions for every module; PEFT reads it; few directions are padded with zeros."""
    it, out = case(kind), f"lssf-{tmp_path.name}"
    manifest, got = run(it, out, alpha=0.7, safety_rank=most)
    before = it.deltas(it.adapter, load_file(it.adapter / "adapter_model.safetensors"))
    after, entries = it.deltas(it.root / out, got), {entry.name: entry for entry in manifest.modules}
    assert {t.shape[0] for name, t in got.items() if "lora_A" in name} == {3 + (most or 64)}
    for module, gram in it.grams.items():
        more, count = added(it, module, most)
        expected = before[module] + 0.7 * more
        assert_near(after[module], expected)
        [entry] = [entry for name, entry in entries.items() if name.endswith(module)]
        assert (entry.decision, entry.directions) == ("merged", count)
        assert entry.rank == 3 + min(count, most or 64)
        assert entry.energy == pytest.approx(float(((before[module] @ gram) * before[module]).sum()), rel=1e-3)
        assert entry.leak == pytest.approx(float(((expected @ gram) * expected).sum()) / entry.energy, rel=2e-3)
        assert (entry.note or "").startswith("--safety-rank takes 2 of") == (most is not None and count > most)
    assert it.loaded(it.root / out).keys() == it.grams.keys()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["finetuned", "adapter"])
def test_full_checkpoint(case: Any, tmp_path: Path, kind: str, form: str) -> None:
    """Of a full fine-tune, and of an adapter that is merged."""
    it, out = case(kind), f"lssf-full-{tmp_path.name}"
    inputs = {"finetuned": it.root / "finetuned"} if form == "finetuned" else {"output_format": "checkpoint"}
    manifest, got = run(it, out, alpha=-1.5, **inputs)
    pairs = it.deltas(it.adapter, load_file(it.adapter / "adapter_model.safetensors"))
    for module in it.grams:
        weight, aligned = it.weight(got, module), it.weight(it.aligned, module).double()
        tuned = it.weight(it.finetuned, module).double() if form == "finetuned" else aligned + pairs[module]
        expected = tuned - aligned - 1.5 * added(it, module)[0]
        assert_near(weight.double() - aligned, expected, 2.0**-22 * float(weight.norm()))
    assert {entry.decision for entry in manifest.modules} == {"merged"}
    assert {entry.weights for entry in manifest.modules} == {(1.0, -1.5)}
    assert all(entry.leak is not None and entry.note is None for entry in manifest.modules)
    assert verify(it.root / out, recompute=3) == []


def test_alpha_0_gives_the_fine_tune(llama: Any) -> None:
    _, got = run(llama, "out", alpha=0.0, finetuned=llama.root / "finetuned")
    assert all(torch.equal(t, llama.finetuned[name]) for name, t in got.items())
    manifest, got = run(llama, "lora", alpha=0.0)
    before = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    for module, delta in llama.deltas(llama.root / "lora", got).items():
        torch.testing.assert_close(delta, before[module], rtol=1e-6, atol=1e-9)
    assert manifest.leak == pytest.approx(1)


def test_jobs_of_one_pair_of_models_share_the_subspace(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And write what each writes alone, from saved Grams too."""
    calls: list[tuple[int, ...]] = []
    original = kernels.subspace.subspace

    def counted(weight: Tensor, *args: Any) -> Any:
        calls.append(tuple(weight.shape))
        return original(weight, *args)

    monkeypatch.setattr(kernels.subspace, "subspace", counted)
    other = llama.make_adapter("other", seed=5)
    calibrate(**{k: v for k, v in options(llama, "grams", save="grams").items()
                 if k not in ("adapter", "unaligned", "entropy")})  # fmt: skip
    variants: list[dict[str, Any]] = [
        {}, {"alpha": 0.5}, {"adapter": other}, {"factors": llama.root / "grams"},
        {"factors": llama.root / "grams", "adapter": other},
    ]  # fmt: skip
    asked = [options(llama, f"shared-{i}", **variant) for i, variant in enumerate(variants)]
    jobs = [
        {k: str(v) if isinstance(v, Path) else v for k, v in job.items() if k != "quiet"} | {"method": "lssf"}
        for job in asked
    ]
    file = llama.root / "jobs.yaml"
    file.write_text(json.dumps({"jobs": jobs}))
    batch(file, quiet=True)
    assert len(calls) == 2 * len(llama.grams)  # once for each source of Grams
    for i, job in enumerate(asked):
        lssf(**job | {"output": llama.root / f"alone-{i}"})
        assert llama.weights(f"alone-{i}") == llama.weights(f"shared-{i}")
    for live, saved in ((0, 3), (2, 4)):
        assert llama.weights(f"alone-{live}") == llama.weights(f"alone-{saved}")


def test_modules_without_a_gram_stay_as_fine_tuned(llama: Any) -> None:
    folder = llama.make_adapter("with-head", target_modules=["q_proj", "lm_head"])
    manifest, got = run(llama, "kept", adapter=folder)
    before = llama.deltas(folder, load_file(folder / "adapter_model.safetensors"))
    after = llama.deltas(llama.root / "kept", got)
    torch.testing.assert_close(after["lm_head"], before["lm_head"], rtol=1e-6, atol=1e-9)
    [entry] = [entry for entry in manifest.modules if entry.name == "lm_head"]
    assert (entry.decision, entry.note) == ("kept", "no decoder linear: as fine-tuned")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"entropy": 0.0}, "entropy"),
        ({"entropy": 1.5}, "entropy"),
        ({"safety_rank": 4, "output_format": "checkpoint"}, "--safety-rank goes with an adapter"),
        ({"factors": "x", "samples": 3}, "samples"),
    ],
)
def test_options_that_contradict(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lssf(**{"aligned": "a", "unaligned": "u", "adapter": "b", "output": tmp_path / "out"} | given)


def test_factors_without_grams_are_refused(llama: Any) -> None:
    calibrate(**{k: v for k, v in options(llama, "factors", save="factors").items()
                 if k not in ("adapter", "unaligned", "entropy")})  # fmt: skip
    with pytest.raises(RequestError, match=r"Gram matrices.*calibrate again"):
        run(llama, "out", factors=llama.root / "factors")


def test_the_command_line_and_an_adapter_for_vllm(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[object] = ["lssf", "--serve", "vllm"]
    for name, value in options(llama, "out", safety_rank=4).items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words if word != "--quiet"])
    assert not stop.value.code
    assert "merged" in capsys.readouterr().out
    assert {t.shape[0] for name, t in llama.tensors("out").items() if "lora_A" in name} == {8}
