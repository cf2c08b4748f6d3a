"""RESTA (arXiv 2402.11746): add what alignment once added, the safety vector, to the fine-tuned weights."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from safeshard import kernels
from safeshard.streamer.methods.base import Edit, Job, Lora, Module, random_key
from safeshard.streamer.options import Finite, Place


class Resta(Job):
    """W <- W_finetuned + gamma * DARE(W_aligned - W_unaligned), entry by entry (section 3).

    Of a full checkpoint the decoder's linears are treated, of an adapter its modules.
    """

    method: ClassVar[str] = "resta"
    title: ClassVar[str] = "RESTA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.11746"
    takes_unaligned: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a lower --gamma"
    grows: ClassVar[str] = "check --gamma"

    unaligned: Place = Field(description="a model without the alignment of `aligned`: its base, or one that lost it")
    gamma: Finite = Field(1.0, description="weight of the safety vector; 0 gives the fine-tuned model")
    density: float | None = Field(
        None, gt=0, le=1, description="fraction of the safety vector's entries that DARE keeps (default: no DARE)"
    )
    seed: int = Field(0, ge=0, description="of DARE's random mask")

    @property
    def writes_checkpoint(self) -> bool:
        return True  # a safety vector has no low rank: an adapter is merged

    def edit(self, module: Module) -> Edit:
        assert module.aligned is not None
        assert module.unaligned is not None
        fields: dict[str, Any] = {"weights": (1.0, self.gamma)}
        tuned, pair = module.finetuned, None
        if isinstance(tuned, Lora):
            pair = tuned.a.float(), tuned.b.float() * tuned.scaling
        tiles = kernels.dense.add_difference(
            module.aligned if isinstance(tuned, Lora) else tuned, pair, module.aligned, module.unaligned, self.gamma,
            self.dense_dtype(module.aligned), self.density or 1.0,
            lambda row: random_key(self.seed, module.name, "safety", str(row)),
        )  # fmt: skip
        return Edit("merged", {"weight": tiles}, fields)
