"""Which text architectures of the installed transformers calibrate: each built small, and held against itself whole.

python tests/streamer/calibration/sweep.py      writes the table of docs/calibration.md
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import plain_experts
import torch
import transformers
from plain_experts import Plain
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.calibration.forward import calibrate
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.calibration.model.weights import Weights
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.inputs.layouts import routes
from safeshard.streamer.sources import open_source

DOCUMENT = Path(__file__).parents[3] / "docs/calibration.md"
BEGIN, END = "<!-- made: architectures -->", "<!-- end -->"
MOST_PARAMETERS = 3_000_000
TOLERANCE = 1e-4
# Sizes under all the names that configurations give them; each takes those that it knows.
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "ffn_hidden_size", "intermediate_size_mlp"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "kv_channels", "swa_head_dim"), 8),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16
    ),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 5),
    "eos_token_id": 2,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 6,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "query_pre_attn_scalar": 8,
    "lru_width": 32,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "state_size": 8,
}
UNTRIED = ("not built", "does not run by itself")  # at this size, for reasons of each one's own
EVEN_IF_NONE = ("num_key_value_heads", "head_dim")
ALTERNATING = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
OWN = {
    "gemma3n_text": {
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "layer_types": ALTERNATING
    },
    "gemma4_text": {"layer_types": ALTERNATING}, "gemma4_unified_text": {"layer_types": ALTERNATING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "ministral": ROPE, "hunyuan_v1_dense": ROPE, "hunyuan_v1_moe": ROPE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip


def kinds() -> list[str]:
    """Text architectures that are causal language models; those that hold one are not architectures of text."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def verdict(kind: str) -> str:
    """What comes of an architecture at small size: "yes", or why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = _small(kind)
        except Exception as error:  # of any kind: the table says which
            return f"not built: {_short(error)}"
        if config is None:
            return "multimodal: by the language model inside"
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                return f"not built: {size // 1_000_000}M parameters at small size"
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception as error:
            return f"not built: {_short(error)}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                model.save_pretrained(folder)
                tokens = [[5, 9, 33, 7, 21, 40, 11], [8, 3, 17], *torch.randint(3, 64, (3, 40)).tolist()]
                expected = _hooked(model, tokens)
                experts = plain_experts.run(model, tokens)
            except Exception as error:
                return f"does not run by itself: {_short(error)}"
            return _compare(Path(folder), tokens, expected, experts)


def _compare(
    folder: Path, tokens: list[list[int]], expected: list[torch.Tensor], experts: dict[tuple[str, int], Plain]
) -> str:
    options = {"budget_bytes": 1 << 30, "key": "a", "saved": HiddenStates([folder])}
    try:
        checkpoint = open_checkpoint(open_source(str(folder)))
        if checkpoint.modules.refused:
            return "refused: experts fused in a way that no table tells (inputs/layouts/families)"
        weights = Weights(checkpoint)
        cpu = torch.device("cpu")
        names = weights.shapes.keys()
        layers = calibrate(
            folder, weights.load, names, tokens, device=cpu, dtype=torch.float32, experts=weights, **options
        )
        made, seen = [], []
        for layer in layers:
            own = {id(gram): gram for gram in layer.grams.values()} if layer.seen else layer.grams
            (seen if layer.seen else made).extend(gram.double() for gram in own.values())
    except RequestError as error:
        offence = error.offences[0]
        if "experts that no code here runs" in offence.got:
            return "refused: experts of a kind of their own"
        if offence.got == "none":
            return "refused: its tensors have other names on disk than in transformers"
        return f"refused: expected {offence.expected}, got {offence.got}"
    except RunError as error:
        return f"refused: {_short(error)}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {_short(error)}"
    made += seen
    for plain in experts.values():
        grams = plain.grams(len(tokens))
        expected += [grams["in"][2], grams["inner"][2]]
    if len(made) != len(expected):
        return f"fails: {len(made)} linears of {len(expected)}"
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(made, expected, strict=True))
    return "yes" if worst < TOLERANCE else f"fails: Grams differ by {worst:.1e}"


def _small(kind: str) -> transformers.PretrainedConfig | None:
    default = transformers.AutoConfig.for_model(kind)
    if default.get_text_config() is not default:
        return None
    if default.is_encoder_decoder:
        raise ValueError("an encoder-decoder")
    said = default.to_dict()
    known = {key: value for key, value in SMALL.items() if key in said and type(said[key]) is not list}
    known = {key: value for key, value in known.items() if said[key] is not None or key in EVEN_IF_NONE}
    if "kv_lora_rank" in known:  # latent attention has as many keys as queries
        known["num_key_value_heads"] = known["num_attention_heads"]
    return transformers.AutoConfig.for_model(kind, **known | OWN.get(kind, {}))


def _hooked(model: nn.Module, tokens: list[list[int]]) -> list[torch.Tensor]:
    """(2 / N) X^T X of every linear in the decoder layers of the whole model, fp64, sample by sample."""
    count = model.config.num_hidden_layers
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    blocks = {name.rpartition(".")[0] for name, _ in plain_experts.experts_of(model)}
    named = {module: name for name, module in model.named_modules()}
    inside = [m for layer in (stacks[0] if stacks else ()) for m in layer.modules() if isinstance(m, kinds)]
    linears = [m for m in inside if not routes(named[m], blocks)]
    sums: dict[nn.Module, torch.Tensor | float] = dict.fromkeys(linears, 0.0)

    def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).double()
        sums[module] = sums[module] + x.T @ x

    with _hooks(linears, add), torch.no_grad():
        for sample in tokens:
            model(input_ids=torch.tensor([sample]), use_cache=False)
    return [total * 2 / len(tokens) for total in sums.values() if isinstance(total, torch.Tensor)]


@contextlib.contextmanager
def _hooks(modules: list[nn.Module], hook) -> Iterator[None]:  # type: ignore[no-untyped-def]
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"[|`<>]", "", lines[0])[:80]


def table() -> str:
    """The document's table: what comes of architectures, and which they are."""
    found: dict[str, list[str]] = {}
    for kind in kinds():
        said = verdict(kind)
        reason = said.partition(": ")[0]
        found.setdefault(reason if reason in UNTRIED else said, []).append(kind)
    tried = {said: names for said, names in found.items() if said.startswith(("yes", "refused", "fails"))}
    count, total = len(found["yes"]), sum(map(len, tried.values()))
    rows = [f"| {said} | {', '.join(found[said])} |" for said in sorted(found, key=lambda said: (said != "yes", said))]
    release = transformers.__version__
    head = f"With transformers {release}, {count} of the {total} that build and run at small size calibrate."
    return "\n".join([head, "", "| calibrates | architectures |", "| --- | --- |", *rows])


def documented() -> str:
    """The table as it stands in the document."""
    return DOCUMENT.read_text().partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]


def main() -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
