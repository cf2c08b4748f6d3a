"""The inputs of the support table: a small set of each kind, and what the planner says of it, method by method."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.bench.inputs.support import KINDS
from safeshard.streamer.extras import require_transformers
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import open_source

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FULL, PAIRS = ("aligned", "unaligned", "finetuned", "safe"), ("adapter", "safe_adapter")
# Of a small model of each family; what a family does not know it keeps.
SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"query_pre_attn_scalar": 6},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1},
}
VISION = {"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


class Inputs:
    """The inputs of one kind by role; each is changed from a plain set of one family."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        base, config, shapes = _family(family)
        self.full = {role: _moved(base, seed) for seed, role in enumerate(FULL)}
        self.configs: dict[str, dict[str, Any]] = {role: json.loads(json.dumps(config)) for role in FULL}
        self.pairs = {role: _pairs(shapes, seed) for seed, role in enumerate(PAIRS)}
        targets = sorted({name.rpartition(".")[2] for name in shapes})
        self.lora: dict[str, dict[str, Any]] = {role: {"target_modules": targets} for role in PAIRS}

    def all(self, change: Callable[[Tensors], Tensors], *roles: str) -> None:
        for role in roles or FULL:
            self.full[role] = change(self.full[role])

    def loras(self, change: Callable[[Tensors], Tensors], *roles: str) -> None:
        for role in roles or PAIRS:
            self.pairs[role] = change(self.pairs[role])

    def write(self) -> dict[str, str]:
        """Write them all; places by role."""
        for role, tensors in self.full.items():
            _write(self.folder / role, "model", tensors, "config", self.configs[role])
        for role, tensors in self.pairs.items():
            config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
            _write(self.folder / role, "adapter_model", tensors, "adapter_config", config | self.lora[role])
        data = self.folder / "data.jsonl"
        data.write_text("".join(json.dumps({"input_ids": [3 + n, 5, 7, 9]}) + "\n" for n in range(2)))
        return {role: str(self.folder / role) for role in (*FULL, *PAIRS)} | {"data": str(data)}


@cache
def _family(family: str) -> tuple[Tensors, dict[str, Any], dict[str, tuple[int, int]]]:
    """A family's tensors, its config.json, and the shapes of its linears that are no experts'."""
    with tempfile.TemporaryDirectory() as place:
        tensors, config = _model(Path(place), family)
        linears = open_checkpoint(open_source(place)).linears
    return tensors, config, {name: stored.shape for name, stored in linears.items() if ".experts." not in name}


def _model(folder: Path, family: str) -> tuple[Tensors, dict[str, Any]]:
    """A model of random weights as transformers saves it to `folder`, and its config.json."""
    transformers = require_transformers()
    config = transformers.AutoConfig.for_model(family, **SIZES | MORE.get(family, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def _write(folder: Path, file: str, tensors: Tensors, config: str, values: Mapping[str, Any]) -> None:
    folder.mkdir()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    (folder / f"{config}.json").write_text(json.dumps(values))


def _moved(tensors: Tensors, seed: int) -> Tensors:
    noise = torch.Generator().manual_seed(seed)
    return {n: (t.float() + 0.1 * torch.randn(t.shape, generator=noise)).to(t.dtype) for n, t in tensors.items()}


def _pairs(shapes: Mapping[str, tuple[int, int]], seed: int) -> Tensors:
    noise, pairs = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns) in shapes.items():
        pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=noise)
        pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=noise) / 9
    return pairs


def _renamed(*words: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            for old, new in words:
                name = re.sub(old, new, name, count=1)
            found[name] = tensor
        return found

    return change


def _without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def _with(*roles: str, **more: Callable[[], Tensor]) -> Callable[[Inputs], None]:
    """Tensors that are added to some inputs; `__` in a name stands for a dot."""
    new = {name.replace("__", "."): make for name, make in more.items()}

    def change(it: Inputs) -> None:
        for role in roles:
            (it.full if role in FULL else it.pairs)[role] |= {name: make() for name, make in new.items()}

    return change


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bfloat16)


def _multimodal(it: Inputs) -> None:
    vision = {f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight": (24, 24) for i in range(2)}
    it.all(lambda t: {f"language_model.{n}": v for n, v in t.items()} | {n: torch.randn(s).bfloat16() for n, s in
                                                                         vision.items()})  # fmt: skip
    for role, text in it.configs.items():
        it.configs[role] = {"model_type": "llava", "text_config": text, "vision_config": VISION, "image_token_index": 1,
                            "tie_word_embeddings": False}  # fmt: skip


def _prefixes(it: Inputs) -> None:
    it.loras(_renamed((r"model\.model\.model\.", "model.model.language_model.")))
    it.all(_renamed((r"^model\.", "model.language_model.")), "finetuned", "safe")


def _towers(it: Inputs) -> None:
    _multimodal(it)
    it.all(_renamed((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
                    (r"^vision_tower", "model.vision_tower")), "finetuned", "safe")  # fmt: skip
    path, shapes = "base_model.model.model.vision_tower.encoder.layers", {"A": (4, 24), "B": (24, 4)}
    it.loras(_renamed((r"model\.model\.model\.", "model.model.language_model.")))
    it.loras(lambda t: t | {f"{path}.{i}.self_attn.q_proj.lora_{s}.weight": torch.ones(shapes[s]) for i in range(2)
                            for s in "AB"})  # fmt: skip


def _text_only(it: Inputs) -> None:
    text = {role: (dict(it.full[role]), it.configs[role]) for role in ("finetuned", "safe")}
    _multimodal(it)
    for role, (tensors, config) in text.items():
        it.full[role], it.configs[role] = tensors, config


def _inside(it: Inputs) -> None:
    it.all(_renamed((r"self_attn\.o_proj", "attn.attention.out_proj"), ("self_attn", "attn.attention"),
                    (r"mlp\.gate_proj", "mlp.c_fc_0"), (r"mlp\.up_proj", "mlp.c_fc_1"), ("down_proj", "c_proj"),
                    (r"model\.layers", "transformer.h"), ("input_layernorm", "ln_1"),
                    ("post_attention_layernorm", "ln_2"), ("model.embed_tokens", "transformer.wte"),
                    (r"^model\.norm", "transformer.ln_f")), "finetuned", "safe")  # fmt: skip
    for role in ("finetuned", "safe"):
        it.configs[role]["model_type"] = "exaone"


def _paired(it: Inputs) -> None:
    """The names alone: what the numbers are, other tests say."""
    it.all(_renamed((r"self_attn\.([qkvo])_proj", r"attention.w\1"), (r"mlp\.gate_proj", "feed_forward.w1"),
                    (r"mlp\.down_proj", "feed_forward.w2"), (r"mlp\.up_proj", "feed_forward.w3"),
                    (r"^lm_head", "output"), ("input_layernorm", "attention_norm"),
                    ("post_attention_layernorm", "ffn_norm"),
                    (r"^model\.embed_tokens", "tok_embeddings"), (r"^model\.", "")), "finetuned", "safe")  # fmt: skip


def _twins(it: Inputs) -> None:
    it.all(lambda t: {f"{s}.{n}": v for s in ("left", "right") for n, v in t.items()}, "aligned", "unaligned")


def _shared_kv(it: Inputs) -> None:
    for config in it.configs.values():
        config["num_kv_shared_layers"] = 1
    lacks = _without(r"layers\.1\.self_attn\.[kv]_proj")
    it.all(lacks, "finetuned", "safe")
    it.loras(lacks)


def _lost(it: Inputs) -> None:
    it.all(_without(r"layers\.1\.mlp"), "finetuned", "safe")
    it.loras(_without(r"layers\.1\.mlp"))


def _zero3(it: Inputs) -> None:
    def emptied(tensors: Tensors) -> Tensors:
        return {name: torch.zeros(0) if t.ndim > 1 else t for name, t in tensors.items()}

    it.all(emptied, "finetuned")
    it.loras(emptied, "adapter")


def _fp8(it: Inputs) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}

    def quantised(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            if "_proj." in name:
                scale = tensor.float().abs().max() / 448
                found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = scale.reshape(1, 1)
            else:
                found[name] = tensor
        return found

    it.all(quantised)
    for config in it.configs.values():
        config["quantization_config"] = said


def _more_rows(it: Inputs) -> None:
    more = {n: torch.cat([it.full["aligned"][n], _ones(2, 24)]) for n in (EMBEDDING, HEAD)}
    it.all(lambda t: t | more, "finetuned", "safe")
    it.loras(lambda t: t | {f"base_model.model.{n}": v for n, v in more.items()}, "adapter")


def _padded_base(it: Inputs) -> None:
    it.all(lambda t: t | {n: _ones(40, 24) for n in (EMBEDDING, HEAD)}, "unaligned")


def _head_of_other_rows(it: Inputs) -> None:
    pair = {
        f"base_model.model.lm_head.lora_{s}.weight": torch.ones(shape) for s, shape in (("A", (4, 24)), ("B", (32, 4)))
    }
    it.loras(lambda t: t | pair, "adapter")
    it.lora["adapter"] = {"target_modules": r".*"}
    _padded_base(it)


def _trained_head(it: Inputs) -> None:
    it.loras(lambda t: t | {f"base_model.model.{HEAD}": torch.ones(32, 24)}, "adapter")
    it.lora["adapter"]["modules_to_save"] = ["lm_head"]


def _safe_resized(it: Inputs) -> None:
    head = torch.cat([it.full["aligned"][HEAD].float(), torch.ones(1, 24)])
    it.loras(lambda t: t | {f"base_model.model.{HEAD}": head}, "safe_adapter")


def _embedding_lora(it: Inputs) -> None:
    path = "base_model.model.model.embed_tokens.lora_embedding_"
    it.loras(lambda t: t | {f"{path}A": torch.ones(4, 32), f"{path}B": torch.ones(24, 4)})
    for config in it.lora.values():
        config["target_modules"] = r".*(_proj|embed_tokens)"


def _configured(**config: Any) -> Callable[[Inputs], None]:
    return lambda it: it.lora["adapter"].update(config)


FAMILIES = frozenset(kind.name for kind in KINDS if kind.group == "family") - {"llava"}
BUILDERS: dict[str, Callable[[Inputs], None]] = {
    **dict.fromkeys((*sorted(FAMILIES), "plain"), lambda it: None),
    "llava": _multimodal, "inside": _inside, "paired": _paired, "fp8": _fp8, "prefixes": _prefixes, "towers": _towers,
    "twins": _twins, "text_only": _text_only, "shared_kv": _shared_kv, "lost": _lost, "zero3": _zero3,
    "mtp": _with("aligned", "unaligned", mtp__layers__0__self_attn__q_proj__weight=partial(_ones, 24, 24)),
    "more_rows": _more_rows, "padded_base": _padded_base, "head_of_other_rows": _head_of_other_rows,
    "trained_head": _trained_head, "safe_resized": _safe_resized, "embedding_lora": _embedding_lora,
    "safe_trained": _with("safe_adapter", base_model__model__lm_head__weight=partial(_ones, 32, 24)),
    "rslora": _configured(use_rslora=True), "dora": _configured(use_dora=True),
    "pissa": _configured(init_lora_weights="pissa"),
}  # fmt: skip
