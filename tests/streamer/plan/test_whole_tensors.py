"""What adapters carry beside their pairs: tensors saved whole, trained or not, and LoRA on embeddings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.streamer import resta, safedelta, safelora, safemerge, scale, verify
from safeshard.streamer.inputs.compare import row_difference
from safeshard.streamer.inputs.headers import read_file_header
from safeshard.streamer.sources import open_source

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = (EMBEDDING, HEAD)
KEY = "base_model.model."


@pytest.fixture
def aligned(world: Any) -> Tensors:
    tensors: Tensors = world.llama()
    world.places = {
        "aligned": world.checkpoint("aligned", tensors, vocab_size=32),
        "unaligned": world.checkpoint("unaligned", {n: t * 1.5 for n, t in tensors.items()}),
    }
    return tensors


def adapter(world: Any, name: str, aligned: Tensors, saved: Tensors, seed: int = 1, **config: Any) -> Any:
    pairs = world.pairs(aligned, 4, seed) | {KEY + n: t.contiguous() for n, t in saved.items()}
    return world.adapter(name, aligned, tensors=pairs, **config)


def resized(aligned: Tensors, rows: int, seed: int = 9, dtype: torch.dtype = torch.float32) -> Tensors:
    """Embeddings and head with more rows, the others as they were."""
    new = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {name: torch.cat([aligned[name].to(dtype), new]) for name in BOTH}


def notes(result: Any, role: str) -> dict[str, tuple[str, str]]:
    return {f.subject: (f.done, f.why) for f in result.manifest.fallbacks if f.asked == role}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_saved_but_not_trained_is_ignored_in_the_safe_adapter(
    world: Any, aligned: Tensors, load_tensors: Any, rows: int, dtype: torch.dtype
) -> None:
    tuned, plain = (
        adapter(world, n, aligned, saved, 1) for n, saved in (("a", resized(aligned, rows, 9, dtype)), ("p", {}))
    )
    safe, bare = (
        adapter(world, n, aligned, saved, 2) for n, saved in (("s", resized(aligned, rows, 5, dtype)), ("b", {}))
    )
    result = safemerge(
        **world.places, adapter=tuned, safe_adapter=safe, output=world.root / "out", threshold=2, quiet=True
    )
    safemerge(**world.places, adapter=plain, safe_adapter=bare, output=world.root / "bare", threshold=2, quiet=True)
    got, expected = load_tensors(world.root / "out"), load_tensors(world.root / "bare")
    for name, tensor in resized(aligned, rows, 9, dtype).items():
        assert torch.equal(got.pop(KEY + name), tensor)  # the fine-tuned adapter's own
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    left = notes(result, "the safe adapter's tensor")
    more = {0: "", 1: " but for 1 row more", 3: " but for 3 rows more"}[rows]
    assert left == {KEY + n: ("left out", f"equal to the aligned one{more} ({safe})") for n in BOTH}
    assert verify(world.root / "out", inputs=True, recompute=3) == []


def test_trained_in_the_safe_adapter_is_refused_with_the_difference(world: Any, aligned: Tensors) -> None:
    saved = resized(aligned, 1)
    saved[HEAD][3] += 0.5
    saved[HEAD][7, 2] -= 0.25
    safe, tuned = adapter(world, "safe", aligned, saved), adapter(world, "a", aligned, {}, 2)
    with pytest.raises(RequestError) as refused:
        safemerge(**world.places, adapter=tuned, safe_adapter=safe, output=world.root / "out", quiet=True)
    [offence] = refused.value.offences
    assert offence.what == KEY + HEAD
    assert offence.got == "trained: 2 of 32 rows differ from the aligned one's by up to 0.5, and it has 1 row more"


@pytest.mark.parametrize("method", ["safemerge", "safelora", "scale"])
def test_a_trained_head_that_is_carried_over_is_said(
    world: Any, aligned: Tensors, load_tensors: Any, method: str
) -> None:
    head = aligned[HEAD].float()
    head[1] += 1
    tuned, safe = (
        adapter(world, "a", aligned, {HEAD: head}, modules_to_save=["lm_head"]),
        adapter(world, "s", aligned, {}, 2),
    )
    given = {"aligned": world.places["aligned"], "adapter": tuned, "output": world.root / "out", "quiet": True}
    gate = {"unaligned": world.places["unaligned"], "threshold": 2}
    result: Any = {
        "safemerge": lambda: safemerge(**given, **gate, safe_adapter=safe),
        "safelora": lambda: safelora(**given, **gate),
        "scale": lambda: scale(**given, factor=0.5),
    }[method]()
    assert torch.equal(load_tensors(world.root / "out")[KEY + HEAD], head)
    [(done, why)] = notes(result, result.job.title).values()
    assert done == "carried over"
    assert "trained: 1 of 32 rows differ from the aligned one's by up to 1" in why


def test_a_trained_embedding_in_a_checkpoint_is_said_and_what_shares_it(
    world: Any, aligned: Tensors, load_tensors: Any
) -> None:
    tied = {name: tensor for name, tensor in aligned.items() if name != HEAD}
    places = {
        False: world.places["aligned"], True: world.checkpoint("tied", tied, tie_word_embeddings=True),
    }  # fmt: skip
    given = adapter(world, "a", aligned, {EMBEDDING: aligned[EMBEDDING].float() + 1}, modules_to_save=["embed_tokens"])
    for shares, place in places.items():
        out = world.root / f"out{shares}"
        result = scale(aligned=place, adapter=given, factor=0.5, output=out, output_format="checkpoint", quiet=True)
        [(done, why)] = notes(result, result.job.title).values()
        assert done == "the adapter's own"
        assert "trained: 32 of 32 rows differ" in why
        assert ("the output head shares it" in why) == shares
        assert torch.equal(load_tensors(out)[EMBEDDING], (aligned[EMBEDDING].float() + 1).bfloat16())


@pytest.mark.parametrize(("shape", "allowed"), [((10, 7), False), ((30, 24), True), ((40, 24), True), ((24,), False)])
def test_a_saved_tensor_has_the_shape_of_the_one_it_replaces(
    world: Any, aligned: Tensors, shape: tuple[int, ...], allowed: bool
) -> None:
    saved = {EMBEDDING: torch.ones(shape)}
    given = {
        "aligned": world.places["aligned"],
        "adapter": adapter(world, "a", aligned, saved, modules_to_save=["embed_tokens"]),
    }
    if allowed:
        scale(**given, output=world.root / "out", factor=0.5, quiet=True)
        return
    with pytest.raises(RequestError, match=r"embed_tokens.*expected \[32, 24\], as model.embed_tokens.weight has"):
        scale(**given, output=world.root / "out", factor=0.5, quiet=True)


@pytest.mark.parametrize("keys", ["all", "saved", "none"])
def test_what_was_never_gathered_says_so(world: Any, aligned: Tensors, keys: str) -> None:
    folder = adapter(world, "a", aligned, resized(aligned, 0), modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    empty = {n: torch.zeros(0) if keys == "all" or "lora_" not in n else t for n, t in tensors.items()}
    save_file({} if keys == "none" else empty, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError) as refused:
        scale(aligned=world.places["aligned"], adapter=folder, output=world.root / "out", factor=0.5, quiet=True)
    [offence] = refused.value.offences
    assert offence.got == {"all": "shape [0], as 30 tensors have", "saved": "shape [0], as 2 tensors have"}.get(
        keys, "a file without tensors"
    )
    assert "ZeRO-3" in offence.remedy


@pytest.mark.parametrize(
    ("saved", "base"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_rows_are_compared_by_value(world: Any, saved: torch.dtype, base: torch.dtype) -> None:
    """An independent count: a loop over rows."""
    ours = torch.randn(3000, 700, generator=torch.Generator().manual_seed(1)).to(base)  # more than one piece
    theirs = torch.cat([ours, torch.ones(5, 700)]).to(saved)
    if base == torch.float32:
        ours = theirs[:3000].float()
    for row, by in ((0, 1.0), (1999, -2.0), (2999, 0.5)):
        theirs[row, row % 700] += by
    folders = [world.checkpoint(n, {"x.weight": t}) for n, t in (("a", ours), ("b", theirs))]
    places = []
    for folder in folders:
        source = open_source(str(folder))
        places.append((source, read_file_header(source, "model.safetensors").tensors["x.weight"]))
    found = row_difference(*places)
    differs = [not torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=False)]
    assert (found.rows, found.common, found.added) == (sum(differs), 3000, 5)
    assert found.largest == pytest.approx(float((ours.float() - theirs[:3000].float()).abs().max()))


def test_lora_on_embeddings_is_what_peft_computes(world: Any, load_tensors: Any, tmp_path: Any) -> None:
    """Scaled, projected, and written into a checkpoint; PEFT merges what is written."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "aligned")
    before = {n: t.clone() for n, t in base.state_dict().items()}
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "unaligned")
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    delta = model.base_model.model.model.embed_tokens.get_delta_weight("default").detach().double()
    given = {"aligned": tmp_path / "aligned", "adapter": tmp_path / "adapter", "quiet": True}
    result = scale(**given, output=tmp_path / "half", factor=0.5)
    projected = safelora(**given, unaligned=tmp_path / "unaligned", output=tmp_path / "projected", threshold=2)
    assert {"model.embed_tokens"} <= {m.name for m in result.manifest.modules}
    v = (before[EMBEDDING] - load_tensors(tmp_path / "unaligned")[EMBEDDING]).double().T  # outputs x tokens
    expected = {"half": 0.5 * delta, "projected": ((v @ v.T / v.norm()) @ delta.T).T}
    cosine = next(m.cosine for m in projected.manifest.modules if m.name == "model.embed_tokens")
    assert cosine == pytest.approx(
        float((expected["projected"] * delta).sum() / expected["projected"].norm() / delta.norm()), abs=1e-5
    )
    for name, wanted in expected.items():
        fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "aligned")
        merged = peft.PeftModel.from_pretrained(fresh, tmp_path / name).merge_and_unload()
        got = merged.state_dict()[EMBEDDING].double() - before[EMBEDDING].double()
        assert torch.allclose(got, wanted, atol=1e-5), name
    safemerge(
        **given, unaligned=tmp_path / "unaligned", safe_adapter=tmp_path / "half", output=tmp_path / "merged",
        threshold=2, combine="exact",
    )  # fmt: skip
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "aligned")
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "merged").merge_and_unload()
    got = merged.state_dict()[EMBEDDING].double() - before[EMBEDDING].double()
    assert torch.allclose(got, 0.8 * delta + 0.2 * 0.5 * delta, atol=1e-5)
    scale(**given, output=tmp_path / "whole", factor=0.5, output_format="checkpoint")
    resta(**given, unaligned=tmp_path / "unaligned", output=tmp_path / "added", gamma=0.3)
    for name, wanted in (("whole", 0.5 * delta), ("added", delta + 0.3 * v.T)):
        got = load_tensors(tmp_path / name)[EMBEDDING].double() - before[EMBEDDING].double()
        assert torch.allclose(got, wanted, atol=1e-5), name


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("output", ["adapter", "checkpoint"])
@pytest.mark.parametrize("rest", ["aligned", "finetuned"])
def test_safe_delta_keeps_added_rows(
    world: Any, load_tensors: Any, tmp_path: Any, rest: str, output: str, trained: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "aligned")
    aligned = load_tensors(tmp_path / "aligned")
    saved = {n: torch.cat([aligned[n], torch.randn(2, 16)]) for n in BOTH}
    if trained:
        saved[HEAD][:40] += 0.1
    folder = adapter(world, "a", aligned, saved, modules_to_save=["lm_head", "embed_tokens"])
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(1, 30))}) + "\n")
    safedelta(
        aligned=tmp_path / "aligned", adapter=folder, calibration=data, samples=1, rest=rest, output_format=output,
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    got, prefix = load_tensors(tmp_path / "out"), KEY if output == "adapter" else ""
    for name in BOTH:
        expected = saved[name] if rest == "finetuned" else torch.cat([aligned[name], saved[name][40:]])
        assert torch.equal(got[prefix + name], expected), name
    if output == "checkpoint":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 42
    else:
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert written["modules_to_save"] == ["lm_head", "embed_tokens"]


def test_all_that_peft_saves_of_a_trained_embedding_fits_into_a_checkpoint(
    world: Any, aligned: Tensors, load_tensors: Any
) -> None:
    """With a resized vocabulary it saves each module three times: trained, as it was, and under its own name."""
    trained = resized(aligned, 3)
    saved = {}
    for name, tensor in trained.items():
        path = name.removesuffix("weight")
        saved |= {
            name: tensor + 1,
            f"{path}modules_to_save.weight": tensor + 1,
            f"{path}original_module.weight": tensor,
        }
    folder = adapter(world, "a", aligned, saved, modules_to_save=["embed_tokens", "lm_head"])
    resta(**world.places, adapter=folder, output=world.root / "out", quiet=True)
    got = load_tensors(world.root / "out")
    assert got.keys() == aligned.keys()
    assert all(torch.equal(got[name], (tensor + 1).bfloat16()) for name, tensor in trained.items())


def test_what_a_checkpoint_has_no_place_for_is_refused_with_a_way(world: Any, aligned: Tensors) -> None:
    folder = adapter(world, "a", aligned, {"score.weight": torch.ones(2, 24)}, modules_to_save=["score"])
    with pytest.raises(RequestError) as refused:
        resta(**world.places, adapter=folder, output=world.root / "out", quiet=True)
    [offence] = refused.value.offences
    assert offence.what == f"{KEY}score.weight"
    assert "merge_and_unload" in offence.remedy
    assert "--rest" not in offence.remedy


def test_a_whole_projector_finds_its_place_under_other_names(world: Any, load_tensors: Any) -> None:
    """Gemma 3, Mistral 3, InternVL: their norms, and weights that are no `.weight`, have other names in memory too."""
    connector = {"norm.weight": (24,), "linear_1.bias": (24,), "linear_1.weight": (24, 24), "mm_weight": (24, 24)}
    aligned = {f"language_model.{n}": t for n, t in world.llama().items()}
    aligned |= {f"multi_modal_projector.{n}": torch.ones(shape).bfloat16() for n, shape in connector.items()}
    pairs = {
        n.replace("language_model.model.", "model.language_model."): t for n, t in world.pairs(aligned, 4, 1).items()
    }
    trained = {f"{KEY}model.multi_modal_projector.{n}": torch.full(shape, 3.0) for n, shape in connector.items()}
    given = {
        "aligned": world.checkpoint("aligned", aligned),
        "adapter": world.adapter("a", aligned, tensors=pairs | trained, modules_to_save=["multi_modal_projector"]),
    }
    result = scale(**given, output=world.root / "adapter", factor=0.5, quiet=True)
    assert all("nothing to compare" not in str(f.why) for f in result.manifest.fallbacks)
    scale(**given, output=world.root / "out", factor=0.5, output_format="checkpoint", quiet=True)
    got = load_tensors(world.root / "out")
    assert got.keys() == aligned.keys()
    assert all((got[f"multi_modal_projector.{n}"] == 3).all() for n in connector)
