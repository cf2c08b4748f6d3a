"""LSSF (arXiv 2602.00038): what alignment added, inside a low-rank safety subspace, on the fine-tuned delta.

    X = D + alpha U U^T (W_aligned - W_unaligned)

See `safeshard.kernels.calibrated.subspace` for U, and docs/lssf.md for what is the paper's and what is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from safeshard import kernels
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.methods.base import Edit, Lora, Module, Served, random_key
from safeshard.streamer.methods.shared.calibrated import CalibratedJob
from safeshard.streamer.methods.shared.served import pad_rank, unit_scaling_config
from safeshard.streamer.options import Finite, Place

if TYPE_CHECKING:
    from torch import Tensor

    from safeshard.kernels.calibrated.grams import Grams


class Lssf(CalibratedJob, Served):
    """Add the safety vector, cut down to the directions in which safe inputs are answered.

    What is added depends on the aligned and the unaligned model alone: jobs of one batch that share them compute it
    once. An adapter's modules get it appended as further rows and columns of its pairs.
    """

    method: ClassVar[str] = "lssf"
    title: ClassVar[str] = "LSSF"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.00038"
    takes_grams: ClassVar[bool] = True
    takes_unaligned: ClassVar[bool] = True
    takes_aligned: ClassVar[bool] = True
    rescales: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a lower --alpha"
    grows: ClassVar[str] = "check --alpha"

    unaligned: Place = Field(description="a model without the alignment of `aligned`: its base, or one that lost it")
    alpha: Finite = Field(1.0, description="weight of what is added; 0 gives the fine-tuned model")
    entropy: float = Field(
        0.8, gt=0, le=1, description="share of the entropy of a module's energies on safe inputs that U holds"
    )
    safety_rank: int | None = Field(
        None, gt=0, description="of an adapter's output: most directions appended to a module (default: 64)"
    )

    @model_validator(mode="after")
    def _of_adapters(self) -> Lssf:
        if self.safety_rank is not None and self.writes_checkpoint:
            raise ValueError("--safety-rank goes with an adapter as output: a checkpoint takes every direction")
        return self

    @property
    def most(self) -> int | None:
        """The most directions of a module."""
        return None if self.writes_checkpoint else self.safety_rank or 64

    @property
    def dense_scratch(self) -> int:
        # In fp64 the weight, its Q, R H R^T and its eigenvectors, LAPACK's copies; U and C of up to three modules; in
        # fp32 the delta, what is written, the output.
        return 64 + 24 + 12

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        assert self.most is not None
        rank = module.rank + self.most
        return {"a": rank, "b": rank}

    def adapter_config(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
        return unit_scaling_config(adapter, ranks)

    def edit(self, module: Module) -> Edit:
        tuned, grams = module.finetuned, module.grams
        if grams is None:
            fields: dict[str, Any] = {"note": "no decoder linear: as fine-tuned"}
            return self._pair(tuned, [], fields) if isinstance(tuned, Lora) else Edit("kept", {"weight": tuned}, fields)
        u, c, fields = self._safety(module, grams)
        if isinstance(tuned, Lora):
            return self._pair(tuned, [(c, u)], fields, grams)
        assert module.aligned is not None
        delta, seed = (tuned.float() - module.aligned.float()).contiguous(), random_key(0, module.name)
        rows = (kernels.leak.dense_rows(each, seed) for each in (delta, delta.addmm(u, c)))
        fields |= kernels.leak.fields(*(kernels.leak.energy(each, grams.safe) for each in rows))
        dtype = self.dense_dtype(module.aligned)
        return Edit("merged", {"weight": kernels.subspace.add(tuned, u, c, dtype)}, fields)

    def _safety(self, module: Module, grams: Grams) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """U, alpha U^T (W_aligned - W_unaligned), and what the manifest says of them."""
        aligned, unaligned = module.aligned, module.unaligned
        assert aligned is not None
        assert unaligned is not None

        def make() -> tuple[Tensor, Tensor, int]:
            found = kernels.subspace.subspace(aligned, grams.safe, self.entropy, self.most)
            return found.u, kernels.subspace.inside(found.u, aligned, unaligned), found.asked

        u, c, asked = grams.remember((self.method, module.name, self.unaligned, self.entropy, self.most), make)
        fields: dict[str, Any] = {"weights": (1.0, self.alpha), "directions": asked}
        if asked > u.shape[1]:
            fields["note"] = f"--safety-rank takes {u.shape[1]} of {asked} directions"
        return u, self.alpha * c, fields

    def _pair(
        self, tuned: Lora, added: list[tuple[Tensor, Tensor]], fields: dict[str, Any], grams: Grams | None = None
    ) -> Edit:
        """A pair for a scaling of 1, with pairs added to it; padded to its rank in the output."""
        import torch

        old_a, old_b = tuned.a.float(), tuned.b.float() * tuned.scaling
        a = torch.cat([old_a, *(c for c, _ in added)])
        b = torch.cat([old_b, *(u for _, u in added)], 1)
        if grams is not None:
            before, left = grams.inner([old_a, a])
            fields |= kernels.leak.fields(kernels.leak.lora_energy(old_b, before), kernels.leak.lora_energy(b, left))
        if self.most is not None:
            fields |= {"rank": len(a)}
            a, b = pad_rank(a, b, len(old_a) + self.most)
        return Edit("merged" if added else "kept", {"a": a, "b": b}, fields)
