"""Streamed results against a plain in-memory computation in fp64 that forms P and every delta densely."""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.streamer import safelora, safemerge, scale

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FP32_ERROR = 3e-6  # of the largest entry: what fp32 arithmetic over these small shapes may lose
Tensors = dict[str, Tensor]
drawn = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Small:
    """One drawn case: checkpoints and adapters on disk, and what the reference reads of them."""

    def __init__(self, world: Any, root: Path, data: st.DataObject) -> None:
        self.world, self.draw = type(world)(root), data.draw
        sizes = st.integers(3, 21)
        self.world.sizes = {"hidden": self.draw(sizes), "kv": self.draw(sizes), "inner": self.draw(sizes)}
        self.shards, self.tied = self.draw(st.sampled_from([1, 3])), self.draw(st.booleans())
        self.aligned = self.world.llama(2, seed=self.draw(st.integers(0, 99)), dtype=torch.float32)
        experts = {
            f"model.layers.1.block.experts.{n}.w1.weight": torch.randn(5, self.world.sizes["hidden"]) for n in range(2)
        }
        self.aligned |= experts
        if self.tied:
            del self.aligned["lm_head.weight"]
        self.unaligned = self.mixed(self.moved(0.3))
        self.finetuned, self.safe = self.mixed(self.moved(0.1)), self.mixed(self.moved(0.1, 100))
        self.aligned = self.mixed(self.aligned)
        self.folders = {
            role: self.world.checkpoint(role, tensors, shards, tie_word_embeddings=self.tied)
            for role, tensors, shards in (
                ("aligned", self.aligned, self.shards),
                ("unaligned", self.unaligned, self.draw(st.sampled_from([1, 2]))),
                ("finetuned", self.finetuned, self.draw(st.sampled_from([1, 2]))),
                ("safe", self.safe, 1),
            )
        }

    def moved(self, by: float, first_seed: int = 0) -> Tensors:
        generator = torch.Generator().manual_seed(first_seed + self.draw(st.integers(0, 99)))
        return {n: t + by * torch.randn(t.shape, generator=generator) for n, t in self.aligned.items()}

    def mixed(self, tensors: Tensors) -> Tensors:
        """Cast all tensors to one drawn dtype, or each to one of the three."""
        names = list(DTYPES)
        kind = self.draw(st.sampled_from([*names, "mixed"]))
        return {n: t.to(DTYPES[names[i % 3] if kind == "mixed" else kind]) for i, (n, t) in enumerate(tensors.items())}

    def adapter(self, name: str, ranks: tuple[int, int], leaves: tuple[str, ...]) -> Path:
        """An adapter on `leaves` and the (tied) head; a rank of its own for v_proj, a scaling of its own for o_proj."""
        drawn = self.draw(st.integers(0, 99))  # an adapter equal to the safe one is refused
        generator = torch.Generator().manual_seed(1000 * sum(name.encode()) + drawn)
        dtype = DTYPES[self.draw(st.sampled_from(list(DTYPES)))]
        modules = [n.removesuffix(".weight") for n in self.aligned if n.split(".")[-2] in leaves]
        if "lm_head" in leaves and self.tied:
            modules.append("lm_head")
        tensors = {}
        for module in modules:
            rows, columns = self.weight(self.aligned, module).shape
            rank = ranks["v_proj" in module]
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        return self.world.adapter(
            name, {}, ranks[0], tensors=tensors, target_modules=list(leaves), lora_alpha=self.draw(st.integers(1, 9)),
            rank_pattern={"v_proj": ranks[1]}, alpha_pattern={"o_proj": 3}, use_rslora=self.draw(st.booleans()),
        )  # fmt: skip

    def weight(self, tensors: Tensors, module: str) -> Tensor:
        name = f"{module}.weight"
        return tensors["model.embed_tokens.weight" if name == "lm_head.weight" and self.tied else name]


@pytest.fixture
def small(world: Any) -> Iterator[Callable[[st.DataObject], Small]]:
    with tempfile.TemporaryDirectory() as root:
        yield lambda data: Small(world, Path(tempfile.mkdtemp(dir=root)), data)


def pairs_of(folder: Path, tensors: Tensors) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module -> A, B (fp64) and scaling, as PEFT reads the folder's config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs = {}
    for name, a in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name):
            b = tensors[name.replace("lora_A", "lora_B")]
            patterns = config.get("alpha_pattern") or {}
            alpha = next(
                (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?{k}", match[1])), config["lora_alpha"]
            )
            rank = a.shape[0]
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            pairs[match[1]] = (a.double(), b.double(), scaling)
    return pairs


def gate(aligned: Tensor, unaligned: Tensor, delta: Tensor) -> tuple[float, Tensor]:
    """The cosine and P delta, P formed as the papers write it."""
    v = aligned.double() - unaligned.double()
    projected = (v @ v.T / v.norm()) @ delta
    return (projected.flatten() @ delta.flatten() / (projected.norm() * delta.norm())).item(), projected


def between(cosines: Mapping[str, float]) -> float:
    """A threshold in the widest gap, so that both decisions occur and none is a matter of rounding."""
    values = sorted(cosines.values())
    low, high = max(itertools.pairwise(values), key=lambda pair: pair[1] - pair[0])
    return (low + high) / 2


def assert_close(got: Tensor, expected: Tensor, name: str, slack: float = 1.0) -> None:
    """Within the rounding of the written dtype, once, and what fp32 arithmetic loses."""
    assert got.shape == expected.shape, name
    bound = ROUNDING[got.dtype] * expected.abs() + slack * FP32_ERROR * expected.abs().max()
    bound += 2.0**-24 if got.dtype == torch.float16 else 0.0
    worst = ((got.double() - expected).abs() - bound).max().item()
    assert worst <= 0, f"{name}: {worst} beyond the bound"


def assert_same_delta(
    got: tuple[Tensor, Tensor, float], dtype: torch.dtype, expected: Tensor, name: str, slack: float = 1.0
) -> None:
    """scaling B A, whose factors were each rounded once to `dtype`."""
    a, b, scaling = got
    delta = scaling * (b @ a)
    bound = 3 * ROUNDING[dtype] * abs(scaling) * (b.abs() @ a.abs()) + slack * FP32_ERROR * expected.abs().max()
    assert ((delta - expected).abs() <= bound).all(), name


def truncated(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def decisions(output: Path) -> dict[str, str]:
    return {m["name"]: m["decision"] for m in json.loads((output / "manifest.json").read_text())["modules"]}


LEAVES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "w1", "lm_head")


@drawn
@given(data=st.data())
@pytest.mark.parametrize("combine", ["linear", "exact", "svd"])
def test_safemerge_of_adapters(small: Any, load_tensors: Any, combine: str, data: st.DataObject) -> None:
    case = small(data)
    ranks = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    other = ranks if combine == "linear" else (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    tuned = case.adapter("tuned", ranks, LEAVES)
    safe = case.adapter("guard", other, data.draw(st.sampled_from([LEAVES, LEAVES[1:4], (*LEAVES, "k_proj")])))
    theirs, guard = pairs_of(tuned, load_tensors(tuned)), pairs_of(safe, load_tensors(safe))
    weights = (data.draw(st.sampled_from([0.8, 1.3])), data.draw(st.sampled_from([0.2, -0.3])))
    rank = data.draw(st.sampled_from([None, 4])) if combine == "svd" else None
    delta = {n: s * (b @ a) for n, (a, b, s) in theirs.items()}
    safe_delta = {n: s * (b @ a) for n, (a, b, s) in guard.items()}
    cosines = {n: gate(case.weight(case.aligned, n), case.weight(case.unaligned, n), d)[0] for n, d in delta.items()}
    threshold, out, dtype = between(cosines), case.world.root / "out", data.draw(st.sampled_from([None, *DTYPES]))

    safemerge(
        aligned=case.folders["aligned"], unaligned=case.folders["unaligned"], adapter=tuned, safe_adapter=safe,
        output=out, threshold=threshold, weights=weights, combine=combine, rank=rank, dtype=dtype, quiet=True,
    )  # fmt: skip
    got = load_tensors(out)
    assert got.keys() == load_tensors(tuned).keys()
    assert decisions(out) == {n: "merged" if c < threshold else "kept" for n, c in cosines.items()}
    written = DTYPES[dtype] if dtype else next(iter(load_tensors(tuned).values())).dtype
    assert {t.dtype for t in got.values()} == {written}
    for name, (a, b, scaling) in pairs_of(out, got).items():
        assert scaling == 1
        inputs = [(weights[0] if cosines[name] < threshold else 1.0, *theirs[name])]
        if cosines[name] < threshold and name in guard:
            inputs.append((weights[1], *guard[name]))
        if combine == "linear":
            roots = [math.copysign(math.sqrt(abs(w * s)), w * s) for w, _, _, s in inputs]
            key = f"base_model.model.{name}"
            expected_a = sum(r * a for r, (_, a, _, _) in zip(roots, inputs, strict=True))
            expected_b = sum(abs(r) * b for r, (_, _, b, _) in zip(roots, inputs, strict=True))
            assert_close(got[f"{key}.lora_A.weight"], expected_a, name)
            assert_close(got[f"{key}.lora_B.weight"], expected_b, name)
            continue
        total = inputs[0][0] * delta[name] + (weights[1] * safe_delta[name] if len(inputs) == 2 else 0)
        if combine == "svd" and cosines[name] < threshold:
            total = truncated(total, rank or theirs[name][0].shape[0])
        assert_same_delta((a, b, scaling), written, total, name, slack=10)


@drawn
@given(data=st.data())
def test_safelora_of_an_adapter(small: Any, load_tensors: Any, data: st.DataObject) -> None:
    case = small(data)
    tuned = case.adapter("tuned", (3, 2), LEAVES)
    given_tensors = load_tensors(tuned)
    theirs = pairs_of(tuned, given_tensors)
    gates = {
        n: gate(case.weight(case.aligned, n), case.weight(case.unaligned, n), s * (b @ a))
        for n, (a, b, s) in theirs.items()
    }
    cosines = {n: c for n, (c, _) in gates.items()}
    threshold, number = between(cosines), data.draw(st.sampled_from([None, 1, 3, 99]))
    rule = {"threshold": threshold} if number is None else {"num_layers": number}
    limit = threshold if number is None else sorted(cosines.values())[: number or 0][-1]
    out, dtype = case.world.root / "out", data.draw(st.sampled_from([None, *DTYPES]))

    safelora(
        aligned=case.folders["aligned"], unaligned=case.folders["unaligned"], adapter=tuned, output=out, dtype=dtype,
        quiet=True, **rule,
    )  # fmt: skip
    got = load_tensors(out)
    assert got.keys() == given_tensors.keys()
    assert decisions(out) == {n: "projected" if c <= limit else "kept" for n, c in cosines.items()}
    for name, (_, b, _) in theirs.items():
        key = f"base_model.model.{name}"
        written = DTYPES[dtype] if dtype else given_tensors[f"{key}.lora_A.weight"].dtype
        assert torch.equal(got[f"{key}.lora_A.weight"], given_tensors[f"{key}.lora_A.weight"].to(written))
        new = got[f"{key}.lora_B.weight"]
        if cosines[name] > limit:
            assert torch.equal(new, given_tensors[f"{key}.lora_B.weight"].to(written))
            continue
        v = case.weight(case.aligned, name).double() - case.weight(case.unaligned, name).double()
        assert new.dtype == written
        assert_close(new, v @ v.T @ b / v.norm(), name)
        assert_same_delta(pairs_of(out, got)[name], written, gates[name][1], name)


@drawn
@given(data=st.data())
def test_scale_of_an_adapter(small: Any, load_tensors: Any, data: st.DataObject) -> None:
    case = small(data)
    tuned = case.adapter("tuned", (3, 2), LEAVES)
    given_tensors = load_tensors(tuned)
    out, factor = case.world.root / "out", data.draw(st.sampled_from([0.0, 0.37, 1.0, -0.5]))
    scale(aligned=case.folders["aligned"], adapter=tuned, output=out, factor=factor, quiet=True)
    got = load_tensors(out)
    assert got.keys() == given_tensors.keys()
    for name, tensor in given_tensors.items():
        if "lora_A" in name:
            assert torch.equal(got[name], tensor)
        else:
            assert_close(got[name], factor * tensor.double(), name)


def full_deltas(case: Small, role: Tensors) -> Tensors:
    """The deltas of the decoder's linear layers."""
    return {
        n.removesuffix(".weight"): role[n].double() - t.double()
        for n, t in case.aligned.items()
        if t.ndim == 2 and ".layers." in n
    }


def assert_untouched(got: Tensors, case: Small, treated: Mapping[str, Any], dtype: str | None) -> None:
    assert got.keys() == case.aligned.keys()
    for name, tensor in case.finetuned.items():
        if name.removesuffix(".weight") not in treated:
            assert torch.equal(got[name], tensor.to(DTYPES[dtype] if dtype else case.aligned[name].dtype)), name


@drawn
@given(data=st.data())
@pytest.mark.parametrize("method", ["linear", "svd", "threshold", "num_layers"])
def test_full_checkpoints(small: Any, load_tensors: Any, method: str, data: st.DataObject) -> None:
    case = small(data)
    delta, safe = full_deltas(case, case.finetuned), full_deltas(case, case.safe)
    gates = {n: gate(case.aligned[f"{n}.weight"], case.unaligned[f"{n}.weight"], d) for n, d in delta.items()}
    cosines = {n: c for n, (c, _) in gates.items()}
    limit = between(cosines) if method != "num_layers" else sorted(cosines.values())[3]
    out, dtype = case.world.root / "out", data.draw(st.sampled_from([None, *DTYPES]))
    common = {r: case.folders[r] for r in ("aligned", "unaligned", "finetuned")} | {"output": out, "dtype": dtype}
    if method in ("linear", "svd"):
        merge = {"combine": method} | ({"rank": 2} if method == "svd" else {})
        safemerge(safe=case.folders["safe"], threshold=limit, weights=(0.7, 0.4), quiet=True, **merge, **common)
        changed = {n for n, c in cosines.items() if c < limit}
        expected = {n: 0.7 * delta[n] + 0.4 * safe[n] for n in changed}
        expected = {n: truncated(d, 2) for n, d in expected.items()} if method == "svd" else expected
    else:
        safelora(quiet=True, **({"threshold": limit} if method == "threshold" else {"num_layers": 4}), **common)
        changed = {n for n, c in cosines.items() if c <= limit}
        expected = {n: gates[n][1] for n in changed}
    got = load_tensors(out)
    assert_untouched(got, case, expected, dtype)
    assert {n for n, d in decisions(out).items() if d != "kept"} == changed
    assert decisions(out).keys() == delta.keys()
    files = {n: f.name for f in case.folders["aligned"].glob("*.safetensors") for n in load_tensors_of(f)}
    assert files == {n: f.name for f in out.glob("*.safetensors") for n in load_tensors_of(f)}
    for name, change in expected.items():
        weight = case.aligned[f"{name}.weight"]
        assert got[f"{name}.weight"].dtype == (DTYPES[dtype] if dtype else weight.dtype)
        assert_close(got[f"{name}.weight"], weight.double() + change, name, slack=3)


def load_tensors_of(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@drawn
@given(data=st.data())
def test_scale_of_a_full_checkpoint(small: Any, load_tensors: Any, data: st.DataObject) -> None:
    case = small(data)
    factor = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    out = case.world.root / "out"
    scale(aligned=case.folders["aligned"], finetuned=case.folders["finetuned"], output=out, factor=factor, quiet=True)
    got = load_tensors(out)
    assert got.keys() == case.aligned.keys()
    for name, weight in case.aligned.items():
        expected = weight.double() + factor * (case.finetuned[name].double() - weight.double())
        assert got[name].dtype == weight.dtype
        assert_close(got[name], expected, name)
        if factor in (0.0, 1.0):
            assert torch.equal(got[name], (case.finetuned[name] if factor else weight).to(weight.dtype))


def test_dare_linear_of_adapters(world: Any, load_tensors: Any) -> None:
    """Entries are kept with the density, rescaled by it, and the masks are independent of side, module and adapter."""
    world.sizes = {"hidden": 120, "kv": 60, "inner": 160}
    paths, density, weights = world.trio(), 0.6, (0.8, 0.2)
    out = world.root / "out"
    safemerge(
        **paths, output=out, threshold=1.01, combine="dare_linear", density=density, weights=weights, seed=7, quiet=True
    )
    got, tuned, safe = (load_tensors(folder) for folder in (out, paths["adapter"], paths["safe_adapter"]))
    masks: dict[tuple[str, int], Tensor] = {}
    for name, tensor in got.items():
        x, y = (math.sqrt(w * 2.0) * t[name].double() / density for w, t in zip(weights, (tuned, safe), strict=True))
        candidates = torch.stack([0 * x, x, y, x + y])
        distance = (candidates - tensor.double()).abs()
        assert distance.min(0).values.max() <= 3e-6 * candidates.abs().max(), name
        choice = distance.argmin(0)
        masks[name, 0], masks[name, 1] = choice % 2 == 1, choice >= 2
    for (name, which), mask in masks.items():
        spread = math.sqrt(density * (1 - density) / mask.numel())
        assert abs(mask.double().mean().item() - density) < 5 * spread, (name, which)
    shapes: dict[Any, list[Tensor]] = {}
    for mask in masks.values():
        shapes.setdefault(mask.shape, []).append(mask)
    for same in shapes.values():
        for i, one in enumerate(same):
            for two in same[:i]:
                agree = (one == two).double().mean().item()
                chance = density**2 + (1 - density) ** 2
                assert abs(agree - chance) < 6 * math.sqrt(chance * (1 - chance) / one.numel())


def test_dare_linear_of_full_checkpoints(world: Any, load_tensors: Any) -> None:
    world.sizes = {"hidden": 96, "kv": 48, "inner": 700}  # more rows than a tile
    aligned = world.llama(1, seed=1, dtype=torch.float32)
    folders = {"aligned": world.checkpoint("aligned", aligned)}
    tensors = {}
    for i, role in enumerate(("unaligned", "finetuned", "safe")):
        generator = torch.Generator().manual_seed(50 + i)
        tensors[role] = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in aligned.items()}
        folders[role] = world.checkpoint(role, tensors[role])
    density, out = 0.5, world.root / "out"
    safemerge(
        **folders, output=out, threshold=1.01, combine="dare_linear", density=density, weights=(0.5, 0.5), quiet=True
    )
    got = load_tensors(out)
    for name, weight in aligned.items():
        if weight.ndim != 2 or ".layers." not in name:
            assert torch.equal(got[name], tensors["finetuned"][name])
            continue
        x, y = (0.5 * (tensors[r][name].double() - weight.double()) / density for r in ("finetuned", "safe"))
        change = got[name].double() - weight.double()
        distance = (torch.stack([0 * x, x, y, x + y]) - change).abs()
        assert distance.min(0).values.max() <= 1e-5, name
        kept = (distance.argmin(0) % 2 == 1).double()
        assert abs(kept.mean().item() - density) < 5 * 0.5 / math.sqrt(kept.numel())
        rows = kept.mean(1) if kept.shape[1] > 60 else kept.mean(0)
        assert rows.std() < 0.1  # no row or tile is favoured
    tiles = (got["model.layers.0.mlp.up_proj.weight"] - aligned["model.layers.0.mlp.up_proj.weight"]) != 0
    assert not torch.equal(tiles[:256], tiles[256:512])


def test_modules_to_save_are_carried_through(world: Any, load_tensors: Any) -> None:
    paths = world.trio()
    tensors = load_tensors(paths["adapter"]) | {"base_model.model.lm_head.weight": torch.randn(32, 24).bfloat16()}
    tuned = world.adapter("with-head", {}, tensors=tensors, modules_to_save=["lm_head"])
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (safemerge, {"unaligned": paths["unaligned"], "safe_adapter": paths["safe_adapter"], "combine": "exact"}),
        (safelora, {"unaligned": paths["unaligned"], "threshold": 0.1}),
        (scale, {"factor": 0.5}),
    ]
    for i, (function, options) in enumerate(calls):
        out = world.root / f"out{i}"
        function(aligned=paths["aligned"], adapter=tuned, output=out, quiet=True, **options)
        head = load_tensors(out)["base_model.model.lm_head.weight"]
        assert torch.equal(head.view(torch.int16), tensors["base_model.model.lm_head.weight"].view(torch.int16))
        assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


def test_a_tied_head_follows_its_embedding(world: Any, load_tensors: Any) -> None:
    """The aligned checkpoint stores the head that it ties; the fine-tuned one does not."""
    aligned = world.llama(1, seed=1)
    aligned["lm_head.weight"] = aligned["model.embed_tokens.weight"].clone()
    generator = torch.Generator().manual_seed(3)
    tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
    del tuned["lm_head.weight"]
    folders = {
        role: world.checkpoint(role, tensors, tie_word_embeddings=True)
        for role, tensors in (
            ("aligned", aligned),
            ("finetuned", tuned),
            ("unaligned", {n: 2 * t for n, t in tuned.items()}),
        )
    }
    unaligned = folders.pop("unaligned")
    safelora(**folders, unaligned=unaligned, threshold=0.0, output=world.root / "projected", quiet=True)
    scale(**folders, factor=0.5, output=world.root / "scaled", quiet=True)
    for name in ("projected", "scaled"):
        got = load_tensors(world.root / name)
        assert got.keys() == aligned.keys()
        assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
        assert not torch.equal(got["lm_head.weight"], aligned["lm_head.weight"])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GPT-2 checkpoints that transformers saved: Conv1D weights are stored in x out, c_proj is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folders = {}
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    for seed, role in enumerate(("aligned", "unaligned", "finetuned", "safe")):
        torch.manual_seed(seed)
        folders[role] = tmp_path_factory.mktemp("gpt2") / role
        GPT2LMHeadModel(config).save_pretrained(folders[role])
    return folders


@pytest.mark.parametrize("method", ["safemerge", "safelora", "scale"])
def test_conv1d_in_full_checkpoints(gpt2: dict[str, Path], tmp_path: Path, load_tensors: Any, method: str) -> None:
    tensors = {role: load_tensors(folder) for role, folder in gpt2.items()}
    aligned, tuned = tensors["aligned"], tensors["finetuned"]
    linears = [n for n, t in aligned.items() if t.ndim == 2 and ".h." in n]
    assert len(linears) == 8
    delta = {n: (tuned[n].double() - aligned[n].double()).T for n in linears}
    gates = {n: gate(aligned[n].T, tensors["unaligned"][n].T, delta[n]) for n in linears}
    limit = between({n: c for n, (c, _) in gates.items()})
    options = {"aligned": gpt2["aligned"], "finetuned": gpt2["finetuned"], "output": tmp_path / "out", "quiet": True}
    if method == "safemerge":
        safemerge(**options, unaligned=gpt2["unaligned"], safe=gpt2["safe"], threshold=limit)
        new = {n: 0.8 * delta[n] + 0.2 * (tensors["safe"][n].double() - aligned[n].double()).T for n in linears}
        new = {n: new[n] if gates[n][0] < limit else delta[n] for n in linears}
    elif method == "safelora":
        safelora(**options, unaligned=gpt2["unaligned"], threshold=limit)
        new = {n: gates[n][1] if gates[n][0] <= limit else delta[n] for n in linears}
    else:
        scale(**options, factor=0.25)
        new = {n: 0.25 * (tuned[n].double() - aligned[n].double()).T for n in linears}
    got = load_tensors(tmp_path / "out")
    assert got.keys() == aligned.keys()
    for name, tensor in got.items():
        if name in new:
            assert_close(tensor, aligned[name].double() + new[name].T, name, slack=3)
        elif method != "scale":
            assert torch.equal(tensor, tuned[name])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_conv1d_under_an_adapter(gpt2: dict[str, Path], world: Any, load_tensors: Any, dtype: str) -> None:
    aligned, unaligned = (load_tensors(gpt2[role]) for role in ("aligned", "unaligned"))
    tensors = {}
    for name, weight in aligned.items():
        if weight.ndim == 2 and ".h." in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            columns, rows = weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, columns).to(DTYPES[dtype])
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 2).to(DTYPES[dtype])
    tuned = world.adapter(
        "tuned", {}, 2, tensors=tensors, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    out = world.root / "out"
    safelora(
        aligned=gpt2["aligned"], unaligned=gpt2["unaligned"], adapter=tuned, output=out, threshold=1.01, quiet=True
    )
    got = pairs_of(out, load_tensors(out))
    assert len(got) == 8
    for module, (a, b, s) in pairs_of(tuned, tensors).items():
        expected = gate(aligned[f"{module}.weight"].T, unaligned[f"{module}.weight"].T, s * (b @ a))[1]
        assert_same_delta(got[module], DTYPES[dtype], expected, module)
