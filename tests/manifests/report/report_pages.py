"""Manifests and evaluations that fill a page."""

from __future__ import annotations

from safeshard.manifests import Manifest, ModuleEntry
from safeshard.manifests.evaluation import EvaluatedModel, Evaluation, Figure
from safeshard.manifests.schema import Caution, Effect

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj", "mlp.experts.0.up_proj", "mlp.shared_expert.up_proj")  # fmt: skip


def measured(manifest: Manifest, name: str) -> Evaluation:
    """Figures of a manifest's output and of a model that was there before, named by others throughout."""
    facts = {"part": name, "low": 0.1, "high": 0.9, "prompts": 9, "ungraded": 1, "incoherent": 0.1, "source": name,
             "grader": name, "sampling": name, "max_tokens": 9, "value": 0.5}  # fmt: skip
    models = {name: manifest.blake3, f"before {name}": None}
    figures = [Figure.model_validate(facts | {"model": model, "measure": measure})
               for model in models for measure in ("attack_success", "utility")]  # fmt: skip
    return Evaluation(
        suite=name, engine=name, versions={name: name}, figures=tuple(figures),
        models=tuple(EvaluatedModel(name=m, source=name, manifest_blake3=seal) for m, seal in models.items()),
    )  # fmt: skip


def gated(example: Manifest, layers: int = 4) -> Manifest:
    """SafeMERGE over more kinds of modules than a table holds; half are merged, one lies near the threshold."""
    modules = [
        ModuleEntry(
            name=f"model.layers.{layer}.{kind}", decision="kept" if (layer + n) % 2 else "merged", threshold=0.35,
            cosine=0.35 + (0.07 if (layer + n) % 2 else -0.09) * (layer + 1), weights=(0.8, 0.2), rank=16,
            near_threshold=True if layer == n else None, note="a note " * 9 if layer == n else None,
            effect=Effect(kept_norm=0.9 - 0.1 * (layer % 8), cosine=0.97, delta_norm=2.0 + n),
        )
        for layer in range(layers)
        for n, kind in enumerate(KINDS)
    ]  # fmt: skip
    warnings = (Caution(kind="removed", text="most of the delta is removed", remedy="a lower --threshold"),)
    effect = Effect(kept_norm=0.8, cosine=0.97)
    changes = {"modules": tuple(modules), "warnings": warnings, "effect": effect, "tensors": example.tensors * 9}
    return example.model_copy(update=changes).sealed()


def ridge(example: Manifest, layers: int = 4, leak: float = 0.008) -> Manifest:
    """Ridge over layers, whose penalties grow a thousandfold."""
    modules = [
        ModuleEntry(
            name=f"model.layers.{layer}.{kind}", decision="shrunk", penalty=10.0 ** (layer - 2) * (n + 1), energy=3.0,
            leak=leak * (n + 1) / 4, rank=16, effect=Effect(kept_norm=0.5 + 0.1 * layer, cosine=0.9, delta_norm=2.0),
        )
        for layer in range(layers)
        for n, kind in enumerate(KINDS)
    ]  # fmt: skip
    method = example.method.model_copy(
        update={"name": "ridge", "options": {"leak": leak, "penalty": None}, "seed": None}
    )
    return example.model_copy(update={"modules": tuple(modules), "method": method}).sealed()


def evaluated(outputs: dict[str, Manifest]) -> Evaluation:
    """Attack success, over-refusal and utility of the outputs, and of two models that were there before."""
    facts = {"prompts": 100, "ungraded": 0, "incoherent": 0.01, "source": "prompts.jsonl", "grader": "refusal",
             "sampling": "greedy", "max_tokens": 128}  # fmt: skip
    seals = {"aligned": None, "fine-tuned": None} | {name: manifest.blake3 for name, manifest in outputs.items()}
    figures = []
    for n, model in enumerate(seals):
        for part, measure, value in (("harmful", "attack_success", 0.1 * n), ("harmless", "over_refusal", 0.05),
                                     ("orders", "utility", 0.2 * n)):  # fmt: skip
            figures.append(Figure.model_validate(
                facts | {"model": model, "part": part, "measure": measure, "value": value,
                         "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05)}
            ))  # fmt: skip
    models = tuple(EvaluatedModel(name=n, source=n, manifest_blake3=seal) for n, seal in seals.items())
    return Evaluation(suite="mine", engine="stand-in", versions={}, models=models, figures=tuple(figures))
