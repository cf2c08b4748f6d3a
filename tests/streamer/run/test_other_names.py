"""Names that differ inside of layers: every method's numbers are those of the same model under one naming."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.streamer.api import safelora, safemerge, scale

Tensors = dict[str, Tensor]
HEAD = 6  # of the world's queries and keys: 4 and 2 heads

EXAONE = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "attn.attention.out_proj", "self_attn": "attn.attention", "input_layernorm": "ln_1",
    "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip
MISTRAL = {
    "model.embed_tokens": "tok_embeddings", "model.layers": "layers", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
}  # fmt: skip


def renamed(tensors: dict[str, Any], words: dict[str, str]) -> dict[str, Any]:
    def name(old: str) -> str:
        for word, new in words.items():
            old = old.replace(word, new, 1)
        return old

    return {name(old): tensor for old, tensor in tensors.items()}


def in_pairs(weight: Tensor) -> Tensor:
    """Rows of a query or key as Mistral publishes them: the inverse of transformers' conversion script."""
    heads = weight.shape[0] // HEAD
    return weight.view(heads, 2, HEAD // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def as_mistral(tensors: Tensors) -> Tensors:
    return renamed({n: in_pairs(t) if re.search(r"[qk]_proj\.weight$", n) else t for n, t in tensors.items()}, MISTRAL)


def as_exaone(tensors: Tensors) -> Tensors:
    return renamed(tensors, EXAONE)


def written(folder: Path) -> Tensors:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def notes(folder: Path) -> list[str]:
    return [f["done"] for f in json.loads((folder / "manifest.json").read_text())["fallbacks"]]


class Models:
    """A base, a chat model, a fine-tuned and a safe one, in one naming or another."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.tensors: dict[str, Tensors] = {"base": world.llama(seed=1)}
        for seed, role in enumerate(("chat", "tuned", "safe")):
            noise = torch.Generator().manual_seed(40 + seed)
            before = self.tensors["base" if role == "chat" else "chat"]
            self.tensors[role] = {
                n: (t.float() + 0.1 * torch.randn(t.shape, generator=noise)).bfloat16() for n, t in before.items()
            }

    def write(self, role: str, change: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Path:
        name = f"{role}_{change.__name__}" if change else role
        tensors = self.tensors[role]
        folder: Path = self.world.checkpoint(name, change(tensors) if change else tensors, **config)
        if change is as_mistral:
            (folder / "config.json").unlink()
            (folder / "params.json").write_text(json.dumps({"dim": 24, "n_heads": 4, "head_dim": HEAD}))
        return folder


@pytest.fixture
def models(world: Any) -> Models:
    return Models(world)


@pytest.mark.parametrize("other", [as_exaone, as_mistral], ids=["exaone", "mistral"])
@pytest.mark.parametrize("aligned_is_other", [False, True], ids=["the_others", "aligned"])
def test_full_checkpoints_in_two_namings(
    models: Models, tmp_path: Path, other: Callable[[Tensors], Tensors], aligned_is_other: bool
) -> None:
    config = {"model_type": "exaone" if other is as_exaone else "mistral"}
    plain = {role: models.write(role, **config) for role in models.tensors}
    ours = plain | {
        role: models.write(role, other, **config) for role in models.tensors if (role == "chat") == aligned_is_other
    }
    naming = other if aligned_is_other else (lambda tensors: tensors)
    outputs = []
    for number, each in enumerate((plain, ours)):
        gate = {"aligned": each["chat"], "unaligned": each["base"], "finetuned": each["tuned"]}
        merged = tmp_path / f"merged{number}"
        result = safemerge(**gate, safe=each["safe"], output=merged, threshold=0.9, weights=(0.6, 0.4))
        cosines = {f"{entry.name}.weight": entry.cosine for entry in result.manifest.modules}
        scaled = tmp_path / f"scaled{number}"
        scale(aligned=each["chat"], finetuned=each["tuned"], factor=0.5, output=scaled)
        projected = tmp_path / f"projected{number}"
        safelora(**gate, threshold=0.7, output=projected)
        outputs.append((cosines, *map(written, (merged, scaled, projected))))
        if each is ours:
            assert any("inside of layers" in note for note in notes(merged))
    (cosines, *expected), (found_cosines, *found) = outputs
    words = (EXAONE if other is as_exaone else MISTRAL) if aligned_is_other else {}
    assert found_cosines == pytest.approx(renamed(cosines, words), abs=1e-6)
    for want, got in zip(expected, found, strict=True):
        want = naming(want)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name].float(), want[name].float(), rtol=1e-2, atol=1e-2, msg=name)
    for name, tensor in found[1].items():  # a plain formula, whatever the naming
        chat, tuned = (naming(models.tensors[role])[name].double() for role in ("chat", "tuned"))
        torch.testing.assert_close(tensor.double(), (chat + tuned) / 2, rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("other", [as_exaone, as_mistral], ids=["exaone", "mistral"])
def test_an_adapter_of_transformers_names_on_a_checkpoint_of_others(
    models: Models, world: Any, tmp_path: Path, other: Callable[[Tensors], Tensors]
) -> None:
    config = {"model_type": "exaone"}
    places = {role: models.write(role, **config) for role in ("chat", "base")}
    others = {role: models.write(role, other, **config) for role in ("chat", "base")}
    for name, seed in (("alice", 3), ("safe_lora", 4)):
        world.adapter(name, models.tensors["chat"], seed=seed)
    found = []
    for number, each in enumerate((places, others)):
        output = tmp_path / f"out{number}"
        result = safelora(
            aligned=each["chat"], unaligned=each["base"], adapter=world.root / "alice", threshold=0.9, output=output
        )
        assert len(result.manifest.modules) == 14
        merged = tmp_path / f"merged{number}"
        scale(aligned=each["chat"], adapter=world.root / "alice", factor=0.5, output=merged,
              output_format="checkpoint")  # fmt: skip
        cosines = {f"{entry.name}.weight": entry.cosine for entry in result.manifest.modules}
        found.append((cosines, written(output), written(merged)))
    cosines, adapter, merged_weights = found[0]
    assert found[1][0] == pytest.approx(renamed(cosines, EXAONE if other is as_exaone else MISTRAL), abs=1e-6)
    assert found[1][1].keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-6)
    for name, tensor in other(merged_weights).items():
        assert torch.equal(found[1][2][name], tensor), name


def test_an_adapter_of_exaone_s_own_names_on_transformers_naming(models: Models, world: Any, tmp_path: Path) -> None:
    aligned = models.write("chat", model_type="exaone")
    pairs = world.pairs(models.tensors["chat"], 4, 3)
    own = renamed({n.replace("base_model.model.", ""): t for n, t in pairs.items()}, EXAONE)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc_0", "c_fc_1", "c_proj"]
    adapter = world.adapter("alice", {}, tensors={f"base_model.model.{n}": t for n, t in own.items()},
                            target_modules=targets)  # fmt: skip
    result = scale(aligned=aligned, adapter=adapter, factor=0.5, output=tmp_path / "out")
    assert {m.name for m in result.manifest.modules} == {
        n.removesuffix(".weight") for n in models.tensors["chat"] if "_proj" in n
    }
    assert written(tmp_path / "out").keys() == {f"base_model.model.{n}" for n in own}
    # a layer that was lost is still missed, under the adapter's own names
    less = {f"base_model.model.{n}": t for n, t in own.items() if "h.1.attn.attention.out_proj" not in n}
    lost = world.adapter("lost", {}, tensors=less, target_modules=targets)
    with pytest.raises(RequestError, match=r"transformer\.h\.1\.attn\.attention\.out_proj"):
        scale(aligned=aligned, adapter=lost, factor=0.5, output=tmp_path / "no")


def test_one_name_inside_of_layers_may_differ(models: Models, tmp_path: Path) -> None:
    def own(tensors: Tensors) -> Tensors:
        return {n.replace("self_attn.g_proj", "self_attn.gate_proj"): t for n, t in tensors.items()}

    for tensors in models.tensors.values():
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.g_proj.weight"] = tensors[
                f"model.layers.{layer}.self_attn.o_proj.weight"
            ].clone() * (1 + len(tensors) % 2)
    aligned, tuned = models.write("chat", model_type="lfm3"), models.write("tuned", own, model_type="lfm3")
    scale(aligned=aligned, finetuned=tuned, factor=0.5, output=tmp_path / "out")
    name = "model.layers.1.self_attn.g_proj.weight"
    expected = (models.tensors["chat"][name].double() + models.tensors["tuned"][name].double()) / 2
    torch.testing.assert_close(written(tmp_path / "out")[name].double(), expected, rtol=8e-3, atol=1e-5)
    assert any("'self_attn.gate_proj' read as 'self_attn.g_proj'" in note for note in notes(tmp_path / "out"))


def test_wrappers_stand_in_names_of_full_fine_tunes(models: Models, tmp_path: Path) -> None:
    """As FSDP with activation checkpointing leaves them: around the model, and around each layer."""

    def wrapped(tensors: Tensors) -> Tensors:
        layers = re.compile(r"(layers\.\d+\.)")
        inside = r"\1_fsdp_wrapped_module._checkpoint_wrapped_module."
        return {f"_fsdp_wrapped_module.{layers.sub(inside, name)}": tensor for name, tensor in tensors.items()}

    aligned, unaligned = models.write("chat"), models.write("base", wrapped)
    outputs = []
    for change in (None, wrapped):
        out = tmp_path / f"out-{change is None}"
        tuned, safe = (models.write(role, change) for role in ("tuned", "safe"))
        safemerge(aligned=aligned, unaligned=unaligned, finetuned=tuned, safe=safe, threshold=0.9, output=out)
        outputs.append(written(out))
    assert outputs[0].keys() == outputs[1].keys() == models.tensors["chat"].keys()
    assert all(torch.equal(outputs[1][name], tensor) for name, tensor in outputs[0].items())
    assert any("a wrapper's names" in note for note in notes(tmp_path / "out-False"))


def test_two_tensors_that_read_alike_are_refused_with_both_readings(models: Models, tmp_path: Path) -> None:
    def own(tensors: Tensors) -> Tensors:
        twice = {n.replace("model.layers", "transformer.h"): t.clone() for n, t in tensors.items() if "up_proj" in n}
        return as_exaone(tensors) | twice

    aligned, tuned = models.write("chat", model_type="exaone"), models.write("tuned", own, model_type="exaone")
    with pytest.raises(RequestError) as refused:
        scale(aligned=aligned, finetuned=tuned, factor=0.5, output=tmp_path / "out")
    message = str(refused.value)
    assert "transformer.h.0.mlp.c_fc_1" in message
    assert "model.layers.0.mlp.up_proj" in message


def test_rows_in_pairs_need_the_size_of_a_head(models: Models, world: Any, tmp_path: Path) -> None:
    aligned, tuned = models.write("chat"), models.write("tuned", as_mistral)
    (tuned / "params.json").unlink()
    with pytest.raises(RequestError, match=r"add the model's params\.json"):
        scale(aligned=aligned, finetuned=tuned, factor=0.5, output=tmp_path / "out")
    # where both have their rows so, the order is no question
    both = models.write("chat", as_mistral)
    (both / "params.json").unlink()
    scale(aligned=both, finetuned=tuned, factor=0.5, output=tmp_path / "out")
    wq = "layers.0.attention.wq.weight"
    want = (written(both)[wq].double() + written(tuned)[wq].double()) / 2
    torch.testing.assert_close(written(tmp_path / "out")[wq].double(), want, rtol=8e-3, atol=1e-5)
    own = {n.replace("model.layers", "layers").replace("self_attn.q_proj", "attention.wq"): t
           for n, t in world.pairs(models.tensors["chat"], 4, 3).items() if "q_proj" in n}  # fmt: skip
    folder = world.adapter("own", {}, tensors=own, target_modules=["wq"])
    for base in (aligned, both):
        with pytest.raises(RequestError, match="one of Mistral's own"):
            scale(aligned=base, adapter=folder, factor=0.5, output=tmp_path / "no")


def test_rest_finetuned_takes_no_rows_of_another_order(models: Models, tmp_path: Path) -> None:
    aligned, tuned = models.write("chat"), models.write("tuned", as_mistral)
    output = tmp_path / "out"
    safelora(aligned=aligned, unaligned=models.write("base"), finetuned=tuned, threshold=-0.5, output=output)
    for name, tensor in written(output).items():  # nothing is changed: all of it is the fine-tuned model
        assert torch.equal(tensor, models.tensors["tuned"][name]), name
