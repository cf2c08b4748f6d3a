"""What people have on disk, and what comes of it: the support table.

Each cell is planned by tests/bench/test_support.py, and says what the planner does there.

A new kind is a row here and a builder of a small one there.
"""

from __future__ import annotations

from dataclasses import dataclass

YES, NOTED, REFUSED, NONE = "yes", "yes, noted", "refused", ""


@dataclass(frozen=True)
class Kind:
    """One kind of input: what becomes of adapters, and of full checkpoints, in the methods without and with a gate.

    `scale` stands for what needs the aligned model alone; the gate's methods are SafeMERGE, SafeLoRA and `score`.
    `tests` name what checks the numbers, as file::function under tests/.
    """

    name: str
    group: str
    text: str
    scale_adapter: str
    gate_adapter: str
    scale_full: str
    gate_full: str
    tests: tuple[str, ...]


_REAL, _WHOLE = "streamer/plan/test_real_checkpoints.py", "streamer/plan/test_whole_tensors.py"
_NAMES, _ADAPTER = "streamer/inputs/test_names.py", "streamer/inputs/test_adapter.py"

KINDS = (
    Kind("plain", "names", "one architecture, one naming", YES, YES, YES, YES,
         ("streamer/run/test_differential.py::test_full_checkpoints",)),
    Kind("prefixes", "names", "other prefixes: another wrapper, or another transformers", NOTED, NOTED, NOTED, NOTED,
         (f"{_NAMES}::test_names_of_a_running_model_read_as_transformers_saves_them",
                 f"{_REAL}::test_all_methods_take_other_prefixes_of_the_same_architecture")),
    Kind("towers", "names", "vision tower and language model with layers of the same names", NOTED, NOTED, NOTED, NOTED,
         (f"{_NAMES}::test_names_of_a_running_model_read_as_transformers_saves_them",)),
    Kind("twins", "names", "two stacks that fit equally well", REFUSED, REFUSED, REFUSED, REFUSED,
         (f"{_NAMES}::test_two_stacks_that_fit_equally_well_are_refused_with_both_readings",)),
    Kind("text_only", "names", "the language model alone, saved from a multimodal release", NOTED, NOTED, NOTED, NOTED,
         (f"{_REAL}::test_the_language_model_alone_of_a_multimodal_release",)),
    Kind("mtp", "storage", "layers for multi-token prediction that the fine-tuned model lacks", YES, YES, NOTED, NOTED,
         (f"{_REAL}::test_layers_for_prediction_are_taken_over",)),
    Kind("shared_kv", "storage", "keys and values of layers that share another's, lacking", YES, YES, NOTED, NOTED,
         (f"{_REAL}::test_shared_keys_and_values_may_lack_in_any_input",
          f"{_REAL}::test_adapters_may_lack_shared_keys_and_values")),
    Kind("lost", "storage", "a layer or a tower that was lost", REFUSED, REFUSED, REFUSED, REFUSED,
         (f"{_REAL}::test_a_lost_layer_is_refused", f"{_REAL}::test_a_lost_vision_tower_is_refused")),
    Kind("zero3", "storage", "tensors of shape [0] (ZeRO-3, FSDP)", REFUSED, REFUSED, REFUSED, REFUSED,
         (f"{_REAL}::test_weights_that_were_never_gathered_say_so", f"{_WHOLE}::test_what_was_never_gathered_says_so")),
    Kind("more_rows", "vocabulary", "added tokens in the fine-tuned model", NOTED, NOTED, NOTED, YES,
         (f"{_REAL}::test_what_is_copied_keeps_its_owner_s_vocabulary",
          f"{_REAL}::test_scale_treats_common_rows_and_says_what_it_does_with_others",
          "streamer/methods/test_safedelta_refusals.py::test_rows_that_the_fine_tuned_model_adds_go_along")),
    Kind("padded_base", "vocabulary", "an unaligned model of another vocabulary", NONE, YES, NONE, YES,
         (f"{_REAL}::test_what_is_copied_keeps_its_owner_s_vocabulary",)),
    Kind("head_of_other_rows", "vocabulary", "the same, where the adapter trains the head", NONE, REFUSED, NONE, NONE,
         ("streamer/plan/test_refusals.py::test_another_vocabulary_where_the_job_computes_with_it",)),
    Kind("trained_head", "adapter", "a trained head or embedding (`modules_to_save`)", NOTED, NOTED, NONE, NONE,
         (f"{_WHOLE}::test_a_trained_head_that_is_carried_over_is_said",
          f"{_WHOLE}::test_safe_delta_keeps_added_rows")),
    Kind("safe_resized", "adapter", "a safe adapter with embeddings saved whole, not trained", NONE, NOTED, NONE, NONE,
         (f"{_WHOLE}::test_saved_but_not_trained_is_ignored_in_the_safe_adapter",)),
    Kind("safe_trained", "adapter", "a safe adapter with a trained head", NONE, REFUSED, NONE, NONE,
         (f"{_WHOLE}::test_trained_in_the_safe_adapter_is_refused_with_the_difference",)),
    Kind("embedding_lora", "adapter", "LoRA on embeddings", YES, YES, NONE, NONE,
         (f"{_WHOLE}::test_lora_on_embeddings_is_what_peft_computes",)),
    Kind("rslora", "adapter", "rsLoRA, rank and alpha patterns", YES, YES, NONE, NONE,
         (f"{_ADAPTER}::test_it_means_what_peft_computes",)),
    Kind("dora", "adapter", "DoRA, LoRA with biases: merge it first", REFUSED, REFUSED, NONE, NONE,
         (f"{_ADAPTER}::test_variants_that_peft_writes_are_refused",)),
    Kind("pissa", "adapter", "PiSSA, OLoRA and the like: convert it first", REFUSED, REFUSED, NONE, NONE,
         ("streamer/plan/test_refusals.py::test_lora_variants",)),
)  # fmt: skip


def markdown() -> str:
    """The table: a row a kind."""
    heads = ["", "inputs", "`scale`, adapter", "gated, adapter", "`scale`, full", "gated, full"]
    rows = [
        [kind.group, kind.text, kind.scale_adapter, kind.gate_adapter, kind.scale_full, kind.gate_full]
        for kind in KINDS
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
