"""Safe Delta (arXiv 2505.12038): keep of the delta what a safety budget allows, and compensate the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from safeshard import kernels
from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import Decision
from safeshard.streamer.inputs.adapter import Adapter, LoraModule
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.methods.base import Edit, Job, Lora, Module, pad_rank, unit_scaling_config
from safeshard.streamer.methods.calibrate import Calibrated
from safeshard.streamer.options import Finite, Place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safeshard.kernels.compensation import LoraCompensated, Scores
    from safeshard.kernels.factor import Factor


class SafeDelta(Job, Calibrated):
    """Keep the delta's cheapest entries within a safety budget and compensate what they do to the safe answers."""

    method: ClassVar[str] = "safedelta"
    title: ClassVar[str] = "Safe Delta"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.12038"
    calibrated: ClassVar[bool] = True
    rescales: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a higher --strength"

    factors: Place | None = Field(None, description="folder that `calibrate` wrote, in place of --calibration")
    strength: Finite = Field(0.1, ge=0, description="the safety budget s; the paper uses about 0.1 on Llama-2-7B")
    selection: Literal["block", "row"] = Field("block", description="a budget for a block of columns, or for each row")
    block_size: int = Field(
        2048, gt=0, description="columns selected together; of each, 15 % at least are left aligned"
    )
    sub_block: int = Field(4, gt=0, le=128, description="columns that do not compensate each other; 1 is exact")
    compensate: bool = Field(True, description="off: revert what is not kept, without compensation (ablation)")
    rest: Literal["aligned", "finetuned"] = Field(
        "aligned", description="whose embeddings, norms, biases and head to take"
    )
    output_format: Literal["adapter", "checkpoint"] | None = Field(
        None, description="of an adapter's output (default: adapter)"
    )
    rank: int | None = Field(None, gt=0, description="truncate an adapter's output to this rank (default: exact)")

    @model_validator(mode="after")
    def _consistent(self) -> SafeDelta:
        if self.factors is not None and (fixed := sorted(self.model_fields_set & Calibrated.model_fields.keys())):
            raise ValueError(f"factors were made with their own {', '.join(fixed)}: leave that to calibrate")
        if self.finetuned is not None and (self.output_format == "adapter" or self.rank is not None):
            raise ValueError("a full checkpoint gives a checkpoint: output_format and rank go with adapter")
        if self.output_format == "checkpoint" and self.rank is not None:
            raise ValueError("rank goes with an adapter output")
        if self.selection == "row" and self.adapter is not None and self.output_format != "checkpoint":
            raise ValueError("selection=row on an adapter has no low rank: add output_format=checkpoint")
        return self

    def factors_key(self) -> str:
        """Equal for jobs that share their factors."""
        decisive = (
            {"aligned", "factors"} if self.factors is not None else {"aligned", "dtype", *Calibrated.model_fields}
        )
        return json.dumps(self.model_dump(mode="json", include=decisive), sort_keys=True)

    def settings(self) -> dict[str, Any]:
        places = {"calibration", "factors"}
        left_out = places | (Calibrated.model_fields.keys() if self.factors is not None else set())
        return {key: value for key, value in super().settings().items() if key not in left_out}

    @property
    def dense_scratch(self) -> int:
        return 20  # in fp32 the delta, what is written, a block's errors and triangle; the mask; the output

    @property
    def writes_checkpoint(self) -> bool:
        return self.finetuned is not None or self.output_format == "checkpoint"

    @property
    def rest_role(self) -> str:
        return self.rest

    def check(self, finetuned: Adapter | Checkpoint, safe: Adapter | Checkpoint | None) -> Iterator[Offence]:
        if isinstance(finetuned, Adapter) and self.writes_checkpoint and self.rest == "finetuned":
            for key in sorted(key for key in finetuned.saved if ".base_layer." not in key):
                expected, remedy = "no whole tensors in the adapter", "use --rest aligned, or an adapter output"
                yield Offence(finetuned.source.spec, key, expected, "one, of modules_to_save or an embedding", remedy)

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        columns = module.a.shape[1]
        rank = self.rank or module.rank * (1 + math.ceil(columns / self.block_size))  # a group of rows more a block
        return {"a": rank, "b": rank}

    def adapter_config(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
        config = unit_scaling_config(adapter, ranks)
        return config if self.rest == "finetuned" else config | {"modules_to_save": None}

    def edit(self, module: Module) -> Edit:
        if module.factor is None:
            return self._rest(module)
        pair, factor = module.finetuned, module.factor
        if not self.writes_checkpoint:
            return self._adapter(module, factor)
        assert module.aligned is not None
        dtype = self.dense_dtype(module.aligned)
        if isinstance(pair, Lora) and self.selection == "block":
            b = pair.b.float() * pair.scaling
            result = self._lora(pair.a.float(), b, factor)
            if result.scores.selected_fraction == 0:
                return Edit("selected", {"weight": module.aligned}, _fields(result.scores, factor))
            delta = kernels.dense.stacked(b[start:stop] @ m for start, stop, m in result.groups)
            return Edit(
                "selected", {"weight": kernels.dense.add(module.aligned, delta, dtype)}, _fields(result.scores, factor)
            )
        return self._dense(module, factor, module.aligned, dtype)

    def _dense(self, module: Module, factor: Factor, aligned: Tensor, dtype: torch.dtype) -> Edit:
        tuned = module.finetuned
        delta = _product(tuned) if isinstance(tuned, Lora) else (tuned.float() - aligned.float()).contiguous()
        result = kernels.compensation.safe_delta_dense(
            delta, factor, self.strength, selection=self.selection, block_size=self.block_size,
            sub_block=self.sub_block, compensate=self.compensate,
        )  # fmt: skip
        if result.scores.selected_fraction == 0:  # to the bit, where adding zero would turn -0 into 0
            return Edit("selected", {"weight": aligned}, _fields(result.scores, factor))
        new = kernels.dense.add(aligned, result.delta, dtype)
        if not isinstance(tuned, Lora):  # to the bit, where adding the delta back may round otherwise
            new = kernels.dense.where(result.mask, tuned, new, dtype)
        return Edit("selected", {"weight": new}, _fields(result.scores, factor))

    def _lora(self, a: Tensor, b: Tensor, factor: Factor) -> LoraCompensated:
        return kernels.compensation.safe_delta_lora(
            a,
            b,
            factor,
            self.strength,
            block_size=self.block_size,
            sub_block=self.sub_block,
            compensate=self.compensate,
        )

    def _adapter(self, module: Module, factor: Factor) -> Edit:
        assert isinstance(module.finetuned, Lora)
        a, b = module.finetuned.a.float(), module.finetuned.b.float() * module.finetuned.scaling
        result = self._lora(a, b, factor)
        fields = _fields(result.scores, factor) | {"rank": len(a) * len(result.groups)}
        new_a, new_b = kernels.compensation.groups_to_adapter(result.groups, b)
        if self.rank is not None:
            new_a, new_b, lost = kernels.merge.truncate(new_a, new_b, self.rank)
            fields |= {"rank": self.rank, "lost_fraction": float(lost)}
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
            {"weight": kernels.dense.add(aligned, _product(pair), dtype) if isinstance(pair, Lora) else pair},
            fields,
        )


def _product(pair: Lora) -> Tensor:
    """The delta of a pair, O x I fp32."""
    return (pair.b.float() * pair.scaling) @ pair.a.float()


def _fields(scores: Scores, factor: Factor) -> dict[str, Any]:
    return {
        "selected_fraction": scores.selected_fraction, "budget": scores.budget, "loss": scores.loss,
        "damping": factor.damping,
    }  # fmt: skip
