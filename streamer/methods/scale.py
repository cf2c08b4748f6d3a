"""The baseline every defence must beat: shrink the whole fine-tuned delta by one factor."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from safeshard import kernels
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.methods.base import Edit, Job, Lora, Module, Served
from safeshard.streamer.options import Finite


class Scale(Job, Served):
    """delta <- factor * delta, for every tensor of a full checkpoint or every pair of an adapter."""

    method: ClassVar[str] = "scale"
    title: ClassVar[str] = "scaled delta (baseline)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.04089"  # task arithmetic: a delta times a factor
    edits_all: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a higher --factor"
    grows: ClassVar[str] = "check --factor"

    factor: Finite = Field(description="0 gives the aligned model, 1 the fine-tuned one")

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        return {"b": module.rank}

    def edit(self, module: Module) -> Edit:
        if isinstance(module.finetuned, Lora):
            return Edit("scaled", {"b": kernels.merge.linear_or_later([module.finetuned.b], [self.factor])})
        assert module.aligned is not None
        dtype = self.dense_dtype(module.aligned)
        return Edit(
            "scaled", {"weight": kernels.dense.interpolate(module.aligned, module.finetuned, self.factor, dtype)}
        )
