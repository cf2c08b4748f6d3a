"""SafeMERGE (arXiv 2503.17239): merge with a safe adapter where fine-tuning left the alignment subspace."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from safeshard import kernels
from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import Decision
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.methods.base import NEAR, Edit, GatedJob, Lora, Module, Served, random_key
from safeshard.streamer.methods.shared.recipe import Published
from safeshard.streamer.methods.shared.served import pad_rank, unit_scaling_config
from safeshard.streamer.options import Finite, Place, flag

if TYPE_CHECKING:
    from safeshard.kernels.merge import Sum

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["linear", "dare_linear", "exact", "svd"]


class SafeMerge(GatedJob, Served, Published):
    """Where cos(P delta, delta) < threshold, merge the fine-tuned delta with the safe one; else keep it (section 3)."""

    method: ClassVar[str] = "safemerge"
    title: ClassVar[str] = "SafeMERGE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.17239"

    rescales: ClassVar[bool] = True
    truncates: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a lower --threshold, or other --weights"
    grows: ClassVar[str] = "check --weights and the safe model"
    published: ClassVar[dict[str, Any]] = {"dtype": "float32"}

    safe_adapter: Place | None = Field(None, description="LoRA adapter trained on safety data")
    safe: Place | None = Field(None, description="full checkpoint trained on safety data, in place of --safe-adapter")
    threshold: Finite = Field(0.35, description="merge where the cosine is below")
    weights: tuple[Finite, Finite] = Field((0.8, 0.2), description="weights of the fine-tuned and the safe delta")
    combine: Combine = Field("linear", description="linear (PEFT's), dare_linear, exact (concatenated ranks) or svd")
    density: float | None = Field(None, gt=0, le=1, description="fraction of entries that dare_linear keeps")
    rank: int | None = Field(None, gt=0, description="rank that svd truncates to (default: the fine-tuned adapter's)")
    seed: int = Field(0, ge=0, description="of dare_linear's random mask")

    @field_validator("weights", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> SafeMerge:
        for finetuned, safe in (("adapter", "safe_adapter"), ("finetuned", "safe")):
            if (getattr(self, finetuned) is None) != (getattr(self, safe) is None):
                lacks = safe if getattr(self, safe) is None else finetuned
                pair = f"{flag(finetuned)} is merged with {flag(safe)}, which was trained on safety data"
                raise ValueError(f"{flag(lacks)} is missing: {pair}")
        if self.recipe is not None and self.adapter is None:
            raise ValueError("--recipe published goes with --adapter: the published code treats nothing else")
        if (self.combine == "dare_linear") != (self.density is not None):
            raise ValueError("--density goes with --combine dare_linear, which needs it")
        if self.rank is not None and self.combine != "svd" and self.serve is None:
            raise ValueError("--rank goes with --combine svd, or with --serve")
        if self.combine == "svd" and self.rank is None and self.finetuned is not None:
            raise ValueError("--combine svd on full checkpoints needs --rank")
        return self

    @property
    def dense_scratch(self) -> int:
        return 24 if self.combine == "svd" else 0  # the delta, its factors and the result in fp32

    def check(self, finetuned: Adapter | Checkpoint, safe: Adapter | Checkpoint | None) -> Iterator[Offence]:
        if not isinstance(finetuned, Adapter) or not isinstance(safe, Adapter):
            return
        for name, module in finetuned.modules.items():
            other = safe.modules.get(name)
            if self.combine in ("linear", "dare_linear") and other and other.rank != module.rank:
                got = f"ranks {module.rank} and {other.rank}"
                yield Offence(
                    safe.source.spec, name, f"equal ranks for --combine {self.combine}", got, "use --combine exact"
                )
            if self.combine == "svd" and self.rank is not None and self.rank < module.rank:
                expected = f"at least {module.rank}, the rank of a module that may be kept as it is"
                yield Offence("--rank", name, expected, str(self.rank), "raise --rank")

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        rank = module.rank
        if self.combine == "exact" and safe is not None:
            rank += safe.rank
        elif self.combine == "svd":
            rank = self.rank or rank
        return {"a": rank, "b": rank}

    def adapter_config(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
        return unit_scaling_config(adapter, ranks)

    def edit(self, module: Module) -> Edit:
        assert module.cosine is not None
        cosine = (
            0.0 if math.isnan(module.cosine) else module.cosine
        )  # as published: what cannot be told apart is merged
        merged = cosine < self.threshold
        fields: dict[str, Any] = {
            "threshold": self.threshold,
            "near_threshold": abs(cosine - self.threshold) <= NEAR,
        }
        if merged:
            fields["weights"] = self.weights
        decision: Decision = "merged" if merged else "kept"
        if not isinstance(module.finetuned, Lora):
            return Edit(decision, {"weight": self._dense(module, fields) if merged else module.finetuned}, fields)
        assert module.safe is None or isinstance(module.safe, Lora)
        a, b = self._merge(module, fields) if merged else self._keep(module.finetuned, module.safe)
        return Edit(decision, {"a": a, "b": b}, fields | {"rank": a.shape[0]})

    def _keep(self, finetuned: Lora, safe: Lora | None) -> tuple[Tensor | Sum, Tensor | Sum]:
        if self.combine in (
            "linear",
            "dare_linear",
        ):  # PEFT's merge of one adapter: the root of its scaling on each side
            sign, root = _signed_root(finetuned.scaling)
            later = kernels.merge.linear_or_later
            return later([finetuned.a], [sign * root]), later([finetuned.b], [root])
        rank = finetuned.a.shape[0] + (safe.a.shape[0] if safe and self.combine == "exact" else 0)
        return pad_rank(
            finetuned.a.float(), kernels.merge.linear([finetuned.b], [finetuned.scaling]), max(rank, self.rank or 0)
        )

    def _merge(self, module: Module, fields: dict[str, Any]) -> tuple[Tensor | Sum, Tensor | Sum]:
        assert isinstance(module.finetuned, Lora)
        pairs = [p for p in (module.finetuned, module.safe) if isinstance(p, Lora)]
        weights = [w * p.scaling for w, p in zip(self.weights, pairs, strict=False)]
        if self.combine in ("linear", "dare_linear"):
            roots = [_signed_root(w) for w in weights]
            a = self._sum(module.name, "a", [p.a for p in pairs], [sign * root for sign, root in roots])
            return a, self._sum(module.name, "b", [p.b for p in pairs], [root for _, root in roots])
        a, b = kernels.ranks.concatenate([(p.a, p.b) for p in pairs], weights)
        if self.combine == "exact":
            return a, b
        a, b, lost = kernels.ranks.truncate(a, b, self.rank or module.finetuned.a.shape[0])
        fields["lost_fraction"] = float(lost)
        return a, b

    def _sum(self, name: str, side: str, tensors: list[Tensor], weights: list[float]) -> Tensor | Sum:
        if self.combine == "linear":
            return kernels.merge.linear_or_later(tensors, weights)
        assert self.density is not None
        keys = [random_key(self.seed, name, role, side) for role in ("finetuned", "safe")[: len(tensors)]]
        return kernels.merge.dare_linear(tensors, weights, self.density, keys)

    def _dense(self, module: Module, fields: dict[str, Any]) -> Iterator[Tensor]:
        assert module.aligned is not None
        assert not isinstance(module.finetuned, Lora)
        assert module.safe is not None
        assert not isinstance(module.safe, Lora)
        tensors, dtype = [module.finetuned, module.safe], self.dense_dtype(module.aligned)
        if self.combine == "svd":
            assert self.rank is not None
            new, fields["lost_fraction"] = kernels.dense.add_low_rank_delta(
                module.aligned, tensors, self.weights, self.rank, dtype
            )
            return new

        def key(index: int, row: int) -> int:
            return random_key(self.seed, module.name, ("finetuned", "safe")[index], "weight", str(row))

        return kernels.dense.add_deltas(module.aligned, tensors, self.weights, dtype, self.density, key)


def _signed_root(value: float) -> tuple[float, float]:
    """Sign and square root of |value|: PEFT puts the root on both A and B, and the sign on A."""
    return (1.0 if value >= 0 else -1.0), math.sqrt(abs(value))
