"""What people have on disk, and what comes of it: the support table.

Its cells are what the planner says of small inputs, one of each kind: `safeshard bench support` plans them all
(`support_inputs` builds the inputs) and writes bench/results/support.csv, from which the table is made. A test plans
every cell again and compares. A new kind is a row here and a builder there.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

YES, NOTED, REFUSED, NONE = "yes", "yes, noted", "refused", ""
PLANNED = Path(__file__).parent.parent / "results" / "support.csv"
# `gate` stands for SafeMERGE, SafeLoRA, `score`, RESTA and LSSF; `scale` for what needs the aligned model alone.
METHODS = ("scale", "gate", "safedelta", "ridge")
COLUMNS = tuple(f"{method}_{form}" for form in ("adapter", "full") for method in METHODS)


@dataclass(frozen=True)
class Kind:
    """One kind of input. `tests` name what checks the numbers, as file::function under tests/."""

    name: str
    group: str
    text: str
    tests: tuple[str, ...]


_REAL, _WHOLE = "streamer/plan/test_real_checkpoints.py", "streamer/plan/test_whole_tensors.py"
_NAMES, _ADAPTER = "streamer/inputs/test_names.py", "streamer/inputs/test_adapter.py"

_DIFF = ("streamer/run/test_differential.py::test_full_checkpoints",)
_OTHER, _EXPERTS = "streamer/run/test_other_names.py", "streamer/run/test_experts.py"

KINDS = (
    Kind("llama", "family", "Llama; Mistral and others of its form", _DIFF),
    Kind("qwen2", "family", "Qwen2, with biases", _DIFF),
    Kind("qwen3", "family", "Qwen3", _DIFF),
    Kind("gemma2", "family", "Gemma 2, head tied to the embedding", _DIFF),
    Kind("phi3", "family", "Phi-3, q, k and v in one tensor", _DIFF),
    Kind("gpt2", "family", "GPT-2, weights stored in x out", _DIFF),
    Kind("exaone", "family", "EXAONE, of names of its own",
         (f"{_OTHER}::test_full_checkpoints_in_two_namings",)),
    Kind("mixtral", "family", "Mixtral", (f"{_EXPERTS}::test_experts_are_merged_by_the_formula",)),
    Kind("qwen3_moe", "family", "Qwen3-MoE", (f"{_EXPERTS}::test_experts_are_merged_by_the_formula",)),
    Kind("llava", "family", "LLaVA and other multimodal models",
         (f"{_REAL}::test_all_methods_take_other_prefixes_of_the_same_architecture",)),
    Kind("inside", "names", "other names inside of layers: as transformers converts them",
         (f"{_OTHER}::test_full_checkpoints_in_two_namings",
          f"{_OTHER}::test_an_adapter_of_transformers_names_on_a_checkpoint_of_others")),
    Kind("paired", "names", "Mistral's own names, with rows of queries and keys in pairs",
         (f"{_OTHER}::test_full_checkpoints_in_two_namings",)),
    Kind("fp8", "storage", "fp8 by block, in all checkpoints",
         ("streamer/run/test_quantised.py::test_a_checkpoint_job_encodes_only_blocks_that_changed",)),
    Kind("plain", "names", "one architecture, one naming",
         ("streamer/run/test_differential.py::test_full_checkpoints",)),
    Kind("prefixes", "names", "other prefixes: another wrapper, or another transformers",
         (f"{_NAMES}::test_names_of_a_running_model_read_as_transformers_saves_them",
                 f"{_REAL}::test_all_methods_take_other_prefixes_of_the_same_architecture")),
    Kind("towers", "names", "vision tower and language model with layers of the same names",
         (f"{_NAMES}::test_names_of_a_running_model_read_as_transformers_saves_them",)),
    Kind("twins", "names", "two stacks that fit equally well",
         (f"{_NAMES}::test_two_stacks_that_fit_equally_well_are_refused_with_both_readings",)),
    Kind("text_only", "names", "the language model alone, saved from a multimodal release",
         (f"{_REAL}::test_the_language_model_alone_of_a_multimodal_release",)),
    Kind("mtp", "storage", "layers for multi-token prediction that the fine-tuned model lacks",
         (f"{_REAL}::test_layers_for_prediction_are_taken_over",)),
    Kind("shared_kv", "storage", "keys and values of layers that share another's, lacking",
         (f"{_REAL}::test_shared_keys_and_values_may_lack_in_any_input",
          f"{_REAL}::test_adapters_may_lack_shared_keys_and_values")),
    Kind("lost", "storage", "a layer or a tower that was lost",
         (f"{_REAL}::test_a_lost_layer_is_refused", f"{_REAL}::test_a_lost_vision_tower_is_refused")),
    Kind("zero3", "storage", "tensors of shape [0] (ZeRO-3, FSDP)",
         (f"{_REAL}::test_weights_that_were_never_gathered_say_so", f"{_WHOLE}::test_what_was_never_gathered_says_so")),
    Kind("more_rows", "vocabulary", "added tokens in the fine-tuned model",
         (f"{_REAL}::test_what_is_copied_keeps_its_owner_s_vocabulary",
          f"{_REAL}::test_scale_treats_common_rows_and_says_what_it_does_with_others",
          "streamer/methods/test_safedelta_refusals.py::test_rows_that_the_fine_tuned_model_adds_go_along")),
    Kind("padded_base", "vocabulary", "an unaligned model of another vocabulary",
         (f"{_REAL}::test_what_is_copied_keeps_its_owner_s_vocabulary",)),
    Kind("head_of_other_rows", "vocabulary", "the same, where the adapter trains the head",
         ("streamer/plan/test_refusals.py::test_another_vocabulary_where_the_job_computes_with_it",)),
    Kind("trained_head", "adapter", "a trained head or embedding (`modules_to_save`)",
         (f"{_WHOLE}::test_a_trained_head_that_is_carried_over_is_said",
          f"{_WHOLE}::test_safe_delta_keeps_added_rows")),
    Kind("safe_resized", "adapter", "a safe adapter with embeddings saved whole, not trained",
         (f"{_WHOLE}::test_saved_but_not_trained_is_ignored_in_the_safe_adapter",)),
    Kind("safe_trained", "adapter", "a safe adapter with a trained head",
         (f"{_WHOLE}::test_trained_in_the_safe_adapter_is_refused_with_the_difference",)),
    Kind("embedding_lora", "adapter", "LoRA on embeddings",
         (f"{_WHOLE}::test_lora_on_embeddings_is_what_peft_computes",)),
    Kind("rslora", "adapter", "rsLoRA, rank and alpha patterns",
         (f"{_ADAPTER}::test_it_means_what_peft_computes",)),
    Kind("dora", "adapter", "DoRA, LoRA with biases: merge it first",
         (f"{_ADAPTER}::test_variants_that_peft_writes_are_refused",)),
    Kind("pissa", "adapter", "PiSSA, OLoRA and the like: convert it first",
         ("streamer/plan/test_refusals.py::test_lora_variants",)),
)  # fmt: skip


def planned() -> dict[str, dict[str, str]]:
    """Kind -> column -> what the planner said."""
    with PLANNED.open(newline="") as lines:
        return {row.pop("kind"): row for row in csv.DictReader(lines)}


def markdown() -> str:
    """The table: a row a kind, the methods' outcomes for adapters and for full checkpoints."""
    names = {"scale": "`scale`", "gate": "gated", "safedelta": "Safe Delta", "ridge": "ridge"}
    heads = ["", "inputs", *(f"{names[m]}, {form}" for form in ("adapter", "full") for m in METHODS)]
    found = planned()
    rows = [[kind.group, kind.text, *(found[kind.name][column] for column in COLUMNS)] for kind in KINDS]
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
