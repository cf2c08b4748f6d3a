"""Safe Delta (arXiv 2505.12038): keep of the delta what a safety budget allows, and compensate the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from safeshard import kernels
from safeshard.manifests.schema import Decision
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.methods.base import Edit, Lora, Module, Served, product, random_key
from safeshard.streamer.methods.calibrate import Calibrated
from safeshard.streamer.methods.shared.calibrated import CalibratedJob
from safeshard.streamer.methods.shared.leak import ladder
from safeshard.streamer.methods.shared.served import pad_rank, unit_scaling_config  # fmt: skip
from safeshard.streamer.options import Finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safeshard.kernels.calibrated.factor import Factor
    from safeshard.kernels.safedelta.compensation import Compensated, LoraCompensated, Scores

STRENGTHS = ladder(1e-3, 1e4, 2)


class SafeDelta(CalibratedJob, Calibrated, Served):
    """Keep the delta's cheapest entries within a safety budget and compensate what they do to the safe answers."""

    method: ClassVar[str] = "safedelta"
    title: ClassVar[str] = "Safe Delta"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.12038"
    rescales: ClassVar[bool] = True
    truncates: ClassVar[bool] = True
    measured_by: ClassVar[tuple[str, ...]] = ("selection", "block_size", "sub_block", "compensate")
    keeps_more: ClassVar[str] = "a higher --strength"
    grows: ClassVar[str] = "compensation adds to what is kept: measure the output"
    published: ClassVar[dict[str, Any]] = Calibrated.published | {"dtype": "float16"}

    strength: Finite = Field(0.1, ge=0, description="the safety budget s; the paper uses about 0.1 on Llama-2-7B")
    leak: Finite | None = Field(
        None,
        gt=0,
        lt=1,
        description="in place of --strength: share of the delta's energy on safe inputs to let through",
    )
    selection: Literal["block", "row"] = Field("block", description="a budget for a block of columns, or for each row")
    block_size: int = Field(
        2048, gt=0, description="columns selected together; of each, 15 % at least are left aligned"
    )
    sub_block: int = Field(4, gt=0, le=128, description="columns that do not compensate each other; 1 is exact")
    compensate: bool = Field(True, description="off: revert what is not kept, without compensation (ablation)")
    rest: Literal["aligned", "finetuned"] = Field(
        "aligned", description="whose embeddings, norms, biases and head to take"
    )
    # Again, as `rank`: of this method the manifest says both, given or not.
    output_format: Literal["adapter", "checkpoint"] | None = Field(
        None, description="of an adapter's output (default: adapter)"
    )
    rank: int | None = Field(None, gt=0, description="truncate an adapter's output to this rank (default: exact)")

    @model_validator(mode="after")
    def _consistent(self) -> SafeDelta:
        if self.leak is not None and "strength" in self.model_fields_set:
            raise ValueError("give either --leak or --strength")
        if self.finetuned is not None and (self.output_format == "adapter" or self.rank is not None):
            raise ValueError("a full checkpoint gives a checkpoint: --output-format and --rank go with --adapter")
        if self.output_format == "checkpoint" and self.rank is not None:
            raise ValueError("--rank goes with an adapter output")
        if self.selection == "row" and self.adapter is not None and self.output_format != "checkpoint":
            raise ValueError("--selection row on an adapter has no low rank: add --output-format checkpoint")
        return self

    @property
    def damping(self) -> float | None:
        return self.percdamp if self.factors is None or "percdamp" in self.model_fields_set else None

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        if self.damping is None:
            del found["percdamp"]  # what was saved with the factors
        return found

    @property
    def target_leak(self) -> float | None:
        return self.leak

    @property
    def strengths(self) -> Sequence[float]:
        return STRENGTHS

    @property
    def dense_scratch(self) -> int:
        return 20  # in fp32 the delta, what is written, a block's errors and triangle; the mask; the output

    @property
    def rest_role(self) -> str:
        return self.rest

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        columns = module.a.shape[1]
        rank = self.rank or module.rank * (1 + math.ceil(columns / self.block_size))  # a group of rows more a block
        return {"a": rank, "b": rank}

    def adapter_config(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
        config = unit_scaling_config(adapter, ranks)
        return config if self.rest == "finetuned" else config | {"modules_to_save": None}

    def measure(self, module: Module) -> list[float]:
        assert module.factor is not None
        factor, pair = module.factor, module.finetuned
        if isinstance(pair, Lora) and self.selection == "block":
            a, b = pair.a.float(), pair.b.float() * pair.scaling
            rows = [kernels.leak.lora_rows(a, b)]
            rows += [_lora_rows(self._lora(a, b, factor, strength), b) for strength in self.strengths]
        else:
            delta, seed = self._delta(module), random_key(0, module.name)
            rows = [kernels.leak.dense_rows(delta, seed)]
            for strength in self.strengths:
                rows.append(kernels.leak.dense_rows(self._dense(delta, factor, strength).delta, seed))
        return [kernels.leak.energy_by_factor(each, factor) for each in rows]

    def edit(self, module: Module) -> Edit:
        if module.factor is None:
            return self._rest(module)
        pair, factor = module.finetuned, module.factor
        strength = self.strength if module.strength is None else module.strength
        if not self.writes_checkpoint:
            return self._adapter(module, factor, strength)
        assert module.aligned is not None
        dtype = self.dense_dtype(module.aligned)
        if isinstance(pair, Lora) and self.selection == "block":
            a, b = pair.a.float(), pair.b.float() * pair.scaling
            result = self._lora(a, b, factor, strength)
            rows = kernels.leak.lora_rows(a, b), _lora_rows(result, b)
            fields = self._fields(result.scores, factor, strength) | _leaked(*rows, factor)
            if result.scores.selected_fraction == 0:
                return Edit("selected", {"weight": module.aligned}, fields)
            delta = kernels.dense.stacked(b[start:stop] @ m for start, stop, m in result.groups)
            return Edit("selected", {"weight": kernels.dense.add(module.aligned, delta, dtype)}, fields)
        return self._weight(module, factor, strength, module.aligned, dtype)

    def _weight(self, module: Module, factor: Factor, strength: float, aligned: Tensor, dtype: torch.dtype) -> Edit:
        tuned, delta, seed = module.finetuned, self._delta(module), random_key(0, module.name)
        result = self._dense(delta, factor, strength)
        rows = kernels.leak.dense_rows(delta, seed), kernels.leak.dense_rows(result.delta, seed)
        fields = self._fields(result.scores, factor, strength) | _leaked(*rows, factor)
        if result.scores.selected_fraction == 0:  # to the bit, where adding zero would turn -0 into 0
            return Edit("selected", {"weight": aligned}, fields)
        new = kernels.dense.add(aligned, result.delta, dtype)
        if not isinstance(tuned, Lora):  # to the bit, where adding the delta back may round otherwise
            new = kernels.dense.where(result.mask, tuned, new, dtype)
        return Edit("selected", {"weight": new}, fields)

    def _delta(self, module: Module) -> Tensor:
        """The fine-tuned delta, O x I fp32."""
        tuned, aligned = module.finetuned, module.aligned
        if isinstance(tuned, Lora):
            return product(tuned)
        assert aligned is not None
        return (tuned.float() - aligned.float()).contiguous()

    def _dense(self, delta: Tensor, factor: Factor, strength: float) -> Compensated:
        return kernels.compensation.safe_delta_dense(
            delta, factor, strength, selection=self.selection, block_size=self.block_size,
            sub_block=self.sub_block, compensate=self.compensate,
        )  # fmt: skip

    def _lora(self, a: Tensor, b: Tensor, factor: Factor, strength: float) -> LoraCompensated:
        return kernels.compensation.safe_delta_lora(
            a, b, factor, strength, block_size=self.block_size, sub_block=self.sub_block, compensate=self.compensate
        )  # fmt: skip

    def _fields(self, scores: Scores, factor: Factor, strength: float) -> dict[str, Any]:
        found = {
            "selected_fraction": scores.selected_fraction, "budget": scores.budget, "loss": scores.loss,
            "damping": factor.damping,
        }  # fmt: skip
        return found if self.leak is None else found | {"strength": strength}

    def _adapter(self, module: Module, factor: Factor, strength: float) -> Edit:
        assert isinstance(module.finetuned, Lora)
        a, b = module.finetuned.a.float(), module.finetuned.b.float() * module.finetuned.scaling
        result = self._lora(a, b, factor, strength)
        fields = self._fields(result.scores, factor, strength) | {"rank": len(a) * len(result.groups)}
        new_a, new_b = kernels.compensation.groups_to_adapter(result.groups, b)
        if self.rank is not None:
            new_a, new_b, lost = kernels.ranks.truncate(new_a, new_b, self.rank)
            fields |= {"rank": self.rank, "lost_fraction": float(lost)}
        fields |= _leaked(kernels.leak.lora_rows(a, b), kernels.leak.lora_rows(new_a, new_b), factor)
        new_a, new_b = self._padded(module.finetuned, new_a, new_b)
        return Edit("selected", {"a": new_a, "b": new_b}, fields)

    def _padded(self, pair: Lora, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        columns, rank = pair.a.shape[1], pair.a.shape[0]
        return pad_rank(a, b, self.rank or rank * (1 + math.ceil(columns / self.block_size)))

    def _rest(self, module: Module) -> Edit:
        """A module without a factor: it is no decoder linear (then `rest` decides), or its Gram has no factor."""
        keep = self.rest == "finetuned" and not module.note
        decision: Decision = "kept" if keep else "reverted"
        fields = {"note": module.note or "no decoder linear: --rest decides"}
        pair, aligned = module.finetuned, module.aligned
        if isinstance(pair, Lora) and not self.writes_checkpoint:
            a, b = self._padded(pair, pair.a.float(), pair.b.float() * (pair.scaling if keep else 0.0))
            return Edit(decision, {"a": a, "b": b}, fields)
        assert aligned is not None
        if not keep:
            return Edit(decision, {"weight": aligned}, fields)
        dtype = self.dense_dtype(aligned)
        return Edit(
            decision,
            {"weight": kernels.dense.add(aligned, product(pair), dtype) if isinstance(pair, Lora) else pair},
            fields,
        )


def _lora_rows(result: LoraCompensated, b: Tensor) -> Tensor:
    """Rows that stand for what is written of a pair."""
    return kernels.leak.lora_rows(*kernels.compensation.groups_to_adapter(result.groups, b))


def _leaked(rows: Tensor, new: Tensor, factor: Factor) -> dict[str, float]:
    """The manifest's `energy` of a delta and the `leak` of what is written of it, where the factor tells them."""
    if factor.added is None:
        return {}
    energy = kernels.leak.energy_by_factor(rows, factor)
    left = kernels.leak.energy_by_factor(new, factor)
    return kernels.leak.fields(energy, left)
