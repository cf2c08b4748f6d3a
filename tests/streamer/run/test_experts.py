"""Full checkpoints of mixtures of experts: every expert of every family against the plain formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from safeshard.streamer import safelora, safemerge, scale, score

Models = dict[str, nn.Module]


def tune(model: nn.Module, seed: int) -> nn.Module:
    """A fine-tuned copy: each expert moved its own way."""
    kind = model.config.model_type
    tuned = mixtures.build(kind, 0)
    tuned.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return tuned


@pytest.fixture(scope="module", params=mixtures.FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Models]:
    """A family's aligned, unaligned, fine-tuned and safe models, and the folder where they lie as released."""
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    models: Models = {"aligned": mixtures.build(kind, 1), "unaligned": mixtures.build(kind, 2)}
    models |= {"finetuned": tune(models["aligned"], 3), "safe": tune(models["aligned"], 4)}
    for role, model in models.items():
        mixtures.save(model, root / role, fused=kind == "qwen3_5_moe_text")
    return kind, root, models


def middle(aligned: nn.Module, unaligned: nn.Module, tuned: nn.Module) -> float:
    """A threshold that parts the experts in two halves."""
    roles = [mixtures.experts(model) for model in (aligned, unaligned, tuned)]
    cosines = sorted(
        mixtures.gate(roles[0][place], roles[1][place], roles[2][place] - roles[0][place])[0] for place in roles[0]
    )
    return sum(cosines[len(cosines) // 2 - 1 : len(cosines) // 2 + 1]) / 2


def places(root: Path, *roles: str) -> dict[str, Any]:
    return {role: root / role for role in roles} | {"quiet": True}


def test_every_expert_is_projected_by_the_formula(family: tuple[str, Path, Models], tmp_path: Path) -> None:
    kind, root, models = family
    threshold = middle(models["aligned"], models["unaligned"], models["finetuned"])
    safelora(**places(root, "aligned", "unaligned", "finetuned"), threshold=threshold, output=tmp_path / "out")
    entries = {entry["name"]: entry for entry in mixtures.manifest(tmp_path / "out")["modules"]}
    routed = {mixtures.role_of(name): entry for name, entry in entries.items() if ".experts." in name}
    aligned, unaligned, tuned = (mixtures.experts(models[role]) for role in ("aligned", "unaligned", "finetuned"))
    written = mixtures.experts(mixtures.loaded(kind, tmp_path / "out"))
    assert routed.keys() == aligned.keys() == written.keys()
    assert len(aligned) == (12 if kind == "deepseek_v3" else 24)
    decisions = set()
    for place, entry in routed.items():
        delta = tuned[place] - aligned[place]
        cosine, projected = mixtures.gate(aligned[place], unaligned[place], delta)
        assert entry["cosine"] == pytest.approx(cosine, abs=1e-6), place
        expected = aligned[place] + projected if cosine <= threshold else tuned[place].double()
        torch.testing.assert_close(written[place].double(), expected, rtol=0, atol=1e-6)
        decisions.add(entry["decision"])
    assert decisions == {"kept", "projected"}


def test_the_output_is_laid_out_as_the_aligned_model(family: tuple[str, Path, Models], tmp_path: Path) -> None:
    _, root, _ = family
    safemerge(**places(root, "aligned", "unaligned", "finetuned", "safe"), output=tmp_path / "out", threshold=2.0)
    files = [load_file(folder / "model.safetensors") for folder in (root / "aligned", tmp_path / "out")]
    assert {n: (t.dtype, t.shape) for n, t in files[0].items()} == {n: (t.dtype, t.shape) for n, t in files[1].items()}


def test_experts_are_merged_by_the_formula(family: tuple[str, Path, Models], tmp_path: Path) -> None:
    kind, root, models = family
    safemerge(**places(root, "aligned", "unaligned", "finetuned", "safe"), output=tmp_path / "out", threshold=2.0)
    roles = [mixtures.experts(models[role]) for role in ("aligned", "finetuned", "safe")]
    for place, weight in mixtures.experts(mixtures.loaded(kind, tmp_path / "out")).items():
        aligned, tuned, safe = (role[place].double() for role in roles)
        expected = aligned + 0.8 * (tuned - aligned) + 0.2 * (safe - aligned)
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


def test_every_tensor_is_scaled(family: tuple[str, Path, Models], tmp_path: Path) -> None:
    _, root, _ = family
    scale(**places(root, "aligned", "finetuned"), factor=0.25, output=tmp_path / "out")
    aligned, tuned, new = (
        load_file(f / "model.safetensors") for f in (root / "aligned", root / "finetuned", tmp_path / "out")
    )
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, torch.lerp(aligned[name], tuned[name], 0.25), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("ours", "theirs"), [(True, False), (False, True)])
def test_release_and_fine_tune_may_be_stored_in_other_ways(tmp_path: Path, ours: bool, theirs: bool) -> None:
    """Qwen3.5 is released fused, and transformers saves it apart: the outputs agree in all but the layout."""
    kind = "qwen3_5_moe_text"
    aligned, unaligned = mixtures.build(kind, 1), mixtures.build(kind, 2)
    tuned = tune(aligned, 3)
    for name, fused in (("mixed", theirs), ("alike", ours)):
        mixtures.save(tuned, tmp_path / name, fused)
    mixtures.save(aligned, tmp_path / "aligned", ours)
    mixtures.save(unaligned, tmp_path / "unaligned", theirs)
    common = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "quiet": True}
    for name in ("mixed", "alike"):
        threshold = middle(aligned, unaligned, tuned)
        safelora(**common, finetuned=tmp_path / name, threshold=threshold, output=tmp_path / f"out-{name}")
        scale(
            aligned=tmp_path / "aligned",
            finetuned=tmp_path / name,
            factor=0.5,
            output=tmp_path / f"half-{name}",
            quiet=True,
        )
    for out in ("out", "half"):
        mixed, alike = (tmp_path / f"{out}-{name}" / "model.safetensors" for name in ("mixed", "alike"))
        assert mixed.read_bytes() == alike.read_bytes()
    names = load_file(tmp_path / "out-mixed/model.safetensors").keys()
    assert names == load_file(tmp_path / "aligned/model.safetensors").keys()


@pytest.mark.parametrize("inner", [10, 12, 24])  # with 12 gate and up are square, with 24 down
def test_what_transformers_saves_of_qwen3_vl_is_not_stored_as_its_releases(tmp_path: Path, inner: int) -> None:
    """It leaves experts as they are in memory, and reads both."""
    aligned, unaligned, tuned = (mixtures.multimodal(seed, moe_intermediate_size=inner) for seed in (1, 2, 3))
    mixtures.save(aligned, tmp_path / "aligned")
    mixtures.save(unaligned, tmp_path / "unaligned")
    mixtures.save(tuned, tmp_path / "released")
    tuned.save_pretrained(tmp_path / "saved")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("released", "saved")]
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    assert torch.equal(stored[0][name], stored[1][name].transpose(1, 2))
    common = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "threshold": 2, "quiet": True}
    results = [safelora(**common, finetuned=tmp_path / n, output=tmp_path / f"out-{n}") for n in ("released", "saved")]
    cosines = [{m.name: m.cosine for m in result.manifest.modules} for result in results]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)
    new, other = (load_file(tmp_path / f"out-{n}" / "model.safetensors") for n in ("released", "saved"))
    assert new.keys() == other.keys()
    for n, tensor in new.items():
        torch.testing.assert_close(other[n], tensor, rtol=0, atol=1e-6)
    scale(aligned=tmp_path / "saved", finetuned=tmp_path / "aligned", factor=0.5, output=tmp_path / "half", quiet=True)
    halfway = mixtures.experts(transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "half"))
    ends = mixtures.experts(aligned), mixtures.experts(tuned)
    for place, weight in halfway.items():
        torch.testing.assert_close(weight, (ends[0][place] + ends[1][place]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("qwen3_vl_moe_text", {"moe_intermediate_size": 12}), ("qwen3_vl_moe_text", {"moe_intermediate_size": 24}),
     ("llama4_text", {"intermediate_size": 12}), ("llama4_text", {"intermediate_size": 24}),
     ("gpt_oss", {"intermediate_size": 12}), ("granitemoe", {"intermediate_size": 24})],
)  # fmt: skip
def test_orientation_is_never_read_off_sizes(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    """unsloth-zoo#779: 57 of 60 deltas were lost to a guess where gate and up, or down, are square."""
    aligned, unaligned = mixtures.build(kind, 1, **sizes), mixtures.build(kind, 2, **sizes)
    tuned = mixtures.build(kind, 3, **sizes)
    models = {"aligned": aligned, "unaligned": unaligned, "finetuned": tuned}
    for role, model in models.items():
        mixtures.save(model, tmp_path / role)
    (result,) = score(**places(tmp_path, "aligned", "unaligned"), finetuned=[tmp_path / "finetuned"])
    roles = [mixtures.experts(models[role]) for role in ("aligned", "unaligned", "finetuned")]
    right = 0
    for name in (name for name in result.cosines if ".experts." in name):
        base, other, new = (role[mixtures.role_of(name)] for role in roles)
        right += result.cosines[name] == pytest.approx(mixtures.gate(base, other, new - base)[0], abs=1e-6)
    assert right == len(roles[0]) == 24


def test_scores_of_experts(family: tuple[str, Path, Models]) -> None:
    _, root, models = family
    (result,) = score(**places(root, "aligned", "unaligned"), finetuned=[root / "finetuned"])
    roles = [mixtures.experts(models[role]) for role in ("aligned", "unaligned", "finetuned")]
    for name, cosine in result.cosines.items():
        if ".experts." in name:
            aligned, unaligned, tuned = (role[mixtures.role_of(name)] for role in roles)
            assert cosine == pytest.approx(mixtures.gate(aligned, unaligned, tuned - aligned)[0], abs=1e-6)
