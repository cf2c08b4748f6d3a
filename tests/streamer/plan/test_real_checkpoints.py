"""Checkpoints as people have them: with tensors that no one builds, other prefixes, other vocabularies."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.streamer import safelora, safemerge, scale, score, verify

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def moved(tensors: Tensors, seed: int) -> Tensors:
    """A checkpoint fine-tuned from another: every matrix a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.ndim > 1 else t.clone()
        for name, t in tensors.items()
    }


def between(aligned: Tensor, tuned: Tensor, factor: float) -> Tensor:
    return (aligned.double() + factor * (tuned.double() - aligned.double())).to(aligned.dtype)


def merged(aligned: Tensor, tuned: Tensor, safe: Tensor) -> Tensor:
    """SafeMERGE's sum of deltas with the default weights."""
    a, f, s = aligned.double(), tuned.double(), safe.double()
    return (a + 0.8 * (f - a) + 0.2 * (s - a)).to(aligned.dtype)


def projected(aligned: Tensor, unaligned: Tensor, tuned: Tensor) -> Tensor:
    """SafeLoRA's projection of a delta."""
    a, v = aligned.double(), aligned.double() - unaligned.double()
    return (a + (v @ v.T / v.norm()) @ (tuned.double() - a)).to(aligned.dtype)


def near(got: Tensor, expected: Tensor) -> bool:
    """Equal up to one rounding to bf16."""
    return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), rtol=2.0**-7, atol=1e-6)


def notes(result: Any) -> list[tuple[str, str]]:
    return [(f.done, f.subject) for f in result.manifest.fallbacks]


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name.removeprefix("model."): t for name, t in tensors.items() if name != HEAD}


UNBUILT = {
    "qwen": {"mtp.fc.weight": (24, 48), "mtp.layers.0.self_attn.q_proj.weight": (24, 24), "mtp.norm.weight": (24,)},
    "deepseek": {"model.layers.2.self_attn.q_proj.weight": (24, 24), "model.layers.2.eh_proj.weight": (24, 48)},
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", list(UNBUILT))
def test_layers_for_prediction_are_taken_over(world: Any, load_tensors: Any, kind: str, shards: int) -> None:
    extra = {name: torch.randn(shape).bfloat16() for name, shape in UNBUILT[kind].items()}
    aligned = world.llama() | extra
    unaligned = moved(aligned, 1)
    tuned, safe = ({n: t for n, t in moved(aligned, seed).items() if n not in extra} for seed in (2, 3))
    config = {"num_hidden_layers": 2}
    places = {
        role: world.checkpoint(role, tensors, shards, **config)
        for role, tensors in (("aligned", aligned), ("unaligned", unaligned), ("finetuned", tuned), ("safe", safe))
    }
    result = safemerge(**places, output=world.root / "merged", threshold=2, quiet=True)
    got = load_tensors(world.root / "merged")
    assert got.keys() == aligned.keys()
    for name, tensor in aligned.items():
        if name in extra:
            assert torch.equal(got[name], tensor)
        elif "_proj" in name:
            assert near(got[name], merged(tensor, tuned[name], safe[name])), name
        else:
            assert torch.equal(got[name], tuned[name])
    assert {module.name for module in result.manifest.modules} == {
        n.removesuffix(".weight") for n in tuned if "_proj" in n
    }
    [(done, subject)] = notes(result)
    assert done == "the aligned one"
    assert subject.endswith(f"and {len(extra) - 1} more")
    assert verify(world.root / "merged", inputs=True, recompute=20) == []

    pair = {role: places[role] for role in ("aligned", "finetuned")}
    scale(**pair, output=world.root / "scaled", factor=0.25, quiet=True)
    got = load_tensors(world.root / "scaled")
    for name, tensor in aligned.items():
        assert torch.equal(got[name], tensor) if name in extra else near(got[name], between(tensor, tuned[name], 0.25))


def test_a_lost_layer_is_refused(world: Any) -> None:
    aligned = world.llama()
    for lost in ("model.layers.1.", "model.norm", HEAD):
        tuned = {n: t for n, t in moved(aligned, 2).items() if not n.startswith(lost)}
        places = [
            world.checkpoint(f"{role}-{lost}", t, num_hidden_layers=2) for role, t in (("a", aligned), ("f", tuned))
        ]
        with pytest.raises(RequestError, match="missing"):
            scale(aligned=places[0], finetuned=places[1], output=world.root / "out", factor=0.5, quiet=True)


@pytest.mark.parametrize("lacks", ["finetuned", "safe", "unaligned"])
def test_shared_keys_and_values_may_lack_in_any_input(world: Any, load_tensors: Any, lacks: str) -> None:
    shared = [f"model.layers.1.self_attn.{m}_proj.weight" for m in "kv"]
    aligned = world.llama()
    tensors = {
        "aligned": aligned,
        "unaligned": moved(aligned, 1),
        "finetuned": moved(aligned, 2),
        "safe": moved(aligned, 3),
    }
    given = {
        role: {n: t for n, t in each.items() if role != lacks or n not in shared} for role, each in tensors.items()
    }
    config = {"text_config": {"num_hidden_layers": 2, "num_kv_shared_layers": 1}}
    places = {role: world.checkpoint(role, each, **config) for role, each in given.items()}
    result = safemerge(**places, output=world.root / "out", threshold=2, quiet=True)
    got = load_tensors(world.root / "out")
    for name in shared:
        expected = {
            "finetuned": aligned[name],
            "safe": merged(aligned[name], tensors["finetuned"][name], aligned[name]),  # the safe delta is zero
            "unaligned": tensors["finetuned"][name],  # nothing to gate it by
        }[lacks]
        assert near(got[name], expected), name
    done = {"finetuned": "the aligned one", "safe": "a zero delta", "unaligned": "carried over"}[lacks]
    assert notes(result) == [(done, f"{shared[0]} and 1 more")]


def test_adapters_may_lack_shared_keys_and_values(world: Any) -> None:
    aligned = world.llama()
    base = {
        n: t
        for n, t in aligned.items()
        if not n.startswith(("model.layers.1.self_attn.k", "model.layers.1.self_attn.v"))
    }
    config = {"num_hidden_layers": 2, "num_kv_shared_layers": 1}
    results = score(
        aligned=world.checkpoint("aligned", aligned, **config),
        unaligned=world.checkpoint("unaligned", moved(aligned, 1), **config),
        adapter=world.adapter("adapter", base), quiet=True,
    )  # fmt: skip
    [result] = results
    assert len(result.cosines) == 12


VOCABULARIES = {"added": (32, 35), "cut": (32, 29)}


@pytest.mark.parametrize("vocabulary", list(VOCABULARIES))
def test_what_is_copied_keeps_its_owner_s_vocabulary(world: Any, load_tensors: Any, vocabulary: str) -> None:
    count = VOCABULARIES[vocabulary][1]
    aligned = world.llama()
    unaligned, tuned, safe = moved(aligned, 1), moved(aligned, 2), moved(aligned, 3)
    for tensors in (tuned, safe):
        for name in (EMBEDDING, HEAD):
            tensors[name] = torch.randn(count, 24).bfloat16()
    unaligned[EMBEDDING] = torch.randn(40, 24).bfloat16()  # of a base that was padded
    places = {
        role: world.checkpoint(role, each, vocab_size=len(each[EMBEDDING]))
        for role, each in (("aligned", aligned), ("unaligned", unaligned), ("finetuned", tuned), ("safe", safe))
    }
    safemerge(**places, output=world.root / "merged", threshold=2, quiet=True)
    gate = {role: places[role] for role in ("aligned", "unaligned", "finetuned")}
    safelora(**gate, output=world.root / "projected", threshold=2, quiet=True)
    for out in ("merged", "projected"):
        got = load_tensors(world.root / out)
        assert torch.equal(got[EMBEDDING], tuned[EMBEDDING])
        assert torch.equal(got[HEAD], tuned[HEAD])
        assert json.loads((world.root / out / "config.json").read_text())["vocab_size"] == count
        for name in (n for n in aligned if "_proj" in n):
            expected = (
                merged(aligned[name], tuned[name], safe[name]) if out == "merged"
                else projected(aligned[name], unaligned[name], tuned[name])
            )  # fmt: skip
            assert near(got[name], expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", list(VOCABULARIES))
def test_scale_treats_common_rows_and_says_what_it_does_with_others(
    world: Any, load_tensors: Any, vocabulary: str, dtype: torch.dtype
) -> None:
    ours, theirs = VOCABULARIES[vocabulary]
    aligned = world.llama()
    tuned = {name: t.to(dtype) for name, t in moved(aligned, 2).items()}
    generator = torch.Generator().manual_seed(3)
    for name in (EMBEDDING, HEAD):
        tuned[name] = torch.randn(theirs, 24, generator=generator).to(dtype)
    places = {
        "aligned": world.checkpoint("aligned", aligned, vocab_size=ours),
        "finetuned": world.checkpoint("finetuned", tuned, vocab_size=theirs),
    }
    result = scale(**places, output=world.root / "out", factor=0.25, quiet=True)
    got, common = load_tensors(world.root / "out"), min(ours, theirs)
    for name in (EMBEDDING, HEAD):
        assert got[name].shape == (theirs, 24)
        assert near(got[name][:common], between(aligned[name][:common], tuned[name][:common], 0.25))
        assert torch.equal(got[name][common:], tuned[name][common:].bfloat16())
    done = "3 added rows as the fine-tuned model has them" if theirs > ours else "3 rows left out"
    assert sorted(notes(result)) == sorted((done, name) for name in (EMBEDDING, HEAD))
    assert json.loads((world.root / "out" / "config.json").read_text())["vocab_size"] == theirs
    assert verify(world.root / "out", inputs=True, recompute=99) == []


def test_a_tied_model_of_a_larger_vocabulary_fills_a_stored_head(world: Any, load_tensors: Any) -> None:
    aligned = world.llama()
    tuned = {n: t for n, t in moved(aligned, 2).items() if n != HEAD}
    tuned[EMBEDDING] = torch.cat([tuned[EMBEDDING], torch.ones(2, 24).bfloat16()])
    places = {
        "aligned": world.checkpoint("aligned", aligned),
        "finetuned": world.checkpoint("finetuned", tuned, tie_word_embeddings=True, vocab_size=34),
    }
    scale(**places, output=world.root / "out", factor=0.5, quiet=True)
    got = load_tensors(world.root / "out")
    assert near(got[HEAD][:32], between(aligned[HEAD], tuned[EMBEDDING][:32], 0.5))
    assert torch.equal(got[HEAD][32:], tuned[EMBEDDING][32:])
    config = json.loads((world.root / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (34, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_head_that_is_stored_all_the_same_is_left_out(world: Any, load_tensors: Any, dtype: torch.dtype) -> None:
    aligned = {n: t for n, t in world.llama().items() if n != HEAD}
    tuned = moved(aligned, 2)
    places = {
        "aligned": world.checkpoint("aligned", aligned, tie_word_embeddings=True),
        "finetuned": world.checkpoint(
            "finetuned", tuned | {HEAD: tuned[EMBEDDING].to(dtype, copy=True)}, tie_word_embeddings=True
        ),
    }
    result = scale(**places, output=world.root / "out", factor=0.5, quiet=True)
    assert notes(result) == [("left out", HEAD)]
    assert load_tensors(world.root / "out").keys() == aligned.keys()


def tower(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    names.append("multi_modal_projector.linear_1.weight")
    return {name: torch.randn(24, 24, generator=generator).bfloat16() for name in names}


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model."])
def test_the_language_model_alone_of_a_multimodal_release(world: Any, load_tensors: Any, prefix: str) -> None:
    text = world.llama()
    release = {f"language_model.{n}": t for n, t in text.items()}
    aligned = release | tower(1)
    tuned = moved(text, 2)
    saved = under(prefix, tuned) | {HEAD: tuned[HEAD]}
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 32, "num_hidden_layers": 2}, "vision_config": {}}
    places = {
        "aligned": world.checkpoint("aligned", aligned, **config),
        "unaligned": world.checkpoint("unaligned", moved(aligned, 3), **config),
        "finetuned": world.checkpoint("finetuned", saved, model_type="gemma3_text", vocab_size=32),
    }
    result = safelora(**places, output=world.root / "out", threshold=2, quiet=True)
    got, unaligned = load_tensors(world.root / "out"), moved(aligned, 3)
    assert got.keys() == aligned.keys()
    for name, tensor in aligned.items():
        own = name.removeprefix("language_model.")
        if name in tower(1):
            assert torch.equal(got[name], tensor)
        elif "_proj" in name:
            assert near(got[name], projected(tensor, unaligned[name], tuned[own])), name
        else:
            assert torch.equal(got[name], tuned[own])
    assert json.loads((world.root / "out" / "config.json").read_text())["model_type"] == "gemma3"
    done = [done for done, _ in notes(result)]
    assert done[0].startswith("module prefix")
    assert done[1:] == ["the aligned one", "the aligned one's"]
    assert verify(world.root / "out", inputs=True, recompute=20) == []


def test_a_lost_vision_tower_is_refused(world: Any) -> None:
    """The configuration still has it."""
    text, config = world.llama(), {"model_type": "gemma3", "vision_config": {}}
    release = {f"language_model.{n}": t for n, t in text.items()}
    aligned = world.checkpoint("aligned", release | tower(1), **config)
    finetuned = world.checkpoint("finetuned", moved(release, 2), **config)
    with pytest.raises(RequestError, match=r"vision_tower.*missing"):
        scale(aligned=aligned, finetuned=finetuned, output=world.root / "out", factor=0.5, quiet=True)


def test_all_methods_take_other_prefixes_of_the_same_architecture(world: Any, load_tensors: Any) -> None:
    """Saved by the names of the running model; the release has the older ones."""
    aligned = {f"language_model.{n}": t for n, t in world.llama().items()} | tower(1)
    roles = {"unaligned": moved(aligned, 1), "finetuned": moved(aligned, 2), "safe": moved(aligned, 3)}

    def running(tensors: Tensors) -> Tensors:
        new = {f"model.{n}": t for n, t in tensors.items() if n in tower(1)}
        new |= {
            n.replace("language_model.model.", "model.language_model."): t
            for n, t in tensors.items()
            if "model.model" in n
        }
        return new | {HEAD: tensors[f"language_model.{HEAD}"]}

    config = {"model_type": "llava", "vision_config": {}, "text_config": {"num_hidden_layers": 2}}
    places = {"aligned": world.checkpoint("aligned", aligned, **config)}
    places |= {role: world.checkpoint(role, running(tensors), **config) for role, tensors in roles.items()}
    result = safemerge(**places, output=world.root / "out", threshold=2, quiet=True)
    got = load_tensors(world.root / "out")
    for name, tensor in aligned.items():
        expected = roles["finetuned"][name]
        if ".layers." in name and tensor.ndim == 2:
            expected = merged(tensor, expected, roles["safe"][name])
        assert near(got[name], expected), name
    assert len(notes(result)) == 3


def test_weights_that_were_never_gathered_say_so(world: Any) -> None:
    aligned = world.llama()
    empty = {n: torch.zeros(0) if t.ndim == 2 else t for n, t in aligned.items()}
    places = [world.checkpoint("aligned", aligned), world.checkpoint("finetuned", empty)]
    with pytest.raises(RequestError) as refused:
        scale(aligned=places[0], finetuned=places[1], output=world.root / "out", factor=0.5, quiet=True)
    [offence] = refused.value.offences
    assert offence.got == "shape [0], as 16 tensors have"
    assert "ZeRO-3" in offence.remedy


def test_layers_for_prediction_that_only_the_fine_tuned_model_has_go_along(world: Any, load_tensors: Any) -> None:
    aligned = world.llama()
    extra = {"mtp.fc.weight": torch.randn(24, 48).bfloat16()}
    places = {
        "aligned": world.checkpoint("aligned", aligned, 2),
        "finetuned": world.checkpoint("finetuned", moved(aligned, 2) | extra, 2),
    }
    scale(**places, output=world.root / "out", factor=0.5, quiet=True)
    assert torch.equal(load_tensors(world.root / "out")["mtp.fc.weight"], extra["mtp.fc.weight"])
    index = json.loads((world.root / "out" / "model.safetensors.index.json").read_text())
    assert "mtp.fc.weight" in index["weight_map"]
