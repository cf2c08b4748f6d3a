"""SafeLoRA (arXiv 2405.16833): project a delta onto the alignment subspace where it points elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from safeshard import kernels
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.methods.base import NEAR, Edit, GatedJob, Lora, Module, Served
from safeshard.streamer.methods.shared.recipe import Published
from safeshard.streamer.options import Finite


class SafeLora(GatedJob, Served, Published):
    """Where cos(P delta, delta) <= threshold, or among the N modules of lowest cosine: delta <- P delta (section 3)."""

    method: ClassVar[str] = "safelora"
    title: ClassVar[str] = "SafeLoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16833"

    keeps_dense_projection: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a lower --threshold, or fewer --num-layers"
    published: ClassVar[dict[str, Any]] = {"dtype": "float32", "num_layers": 10}

    threshold: Finite | None = Field(None, description="project where the cosine is at most this")
    num_layers: int | None = Field(
        None, gt=0, description="project the N modules of lowest cosine, in place of --threshold"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> SafeLora:
        if (self.threshold is None) == (self.num_layers is None):
            raise ValueError("give either --threshold or --num-layers")
        if self.recipe is not None and self.adapter is None:
            raise ValueError("--recipe published goes with --adapter: the published code treats nothing else")
        return self

    @classmethod
    def _recipe(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in cls.published.items() if key != "num_layers" or "threshold" not in values}

    @property
    def dense_scratch(self) -> int:
        return 4  # the projected delta in fp32

    @property
    def ranks_first(self) -> bool:
        return self.num_layers is not None

    def choose(self, cosines: Mapping[str, float | None]) -> set[str]:
        known = sorted(c for c in cosines.values() if c is not None)
        if not known or self.num_layers is None:
            return set()
        limit = known[: self.num_layers][-1]
        return {name for name, cosine in cosines.items() if cosine is not None and cosine <= limit}

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        return {"b": module.rank}

    def edit(self, module: Module) -> Edit:
        assert module.cosine is not None
        fields: dict[str, Any] = {}
        project = bool(module.chosen)
        if self.threshold is not None:
            project = module.cosine <= self.threshold
            fields = {"threshold": self.threshold, "near_threshold": abs(module.cosine - self.threshold) <= NEAR}
        dense = not isinstance(module.finetuned, Lora)
        if not project:
            kept = module.finetuned.b if isinstance(module.finetuned, Lora) else module.finetuned
            return Edit("kept", {"weight" if dense else "b": kept}, fields)
        assert module.projected is not None
        if not dense:
            return Edit("projected", {"b": module.projected}, fields)
        assert module.aligned is not None
        new = kernels.dense.add(module.aligned, module.projected, self.dense_dtype(module.aligned))
        return Edit("projected", {"weight": new}, fields)
