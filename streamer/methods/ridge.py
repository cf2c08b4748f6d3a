"""Ridge: the closed form of what Safe Delta approximates. Stay near the fine-tuned delta, change least on safe inputs.

    X = D (I + penalty H / mean(diag(H)))^-1

with H the Gram of the safe inputs; of a LoRA adapter only A changes. See `kernels/calibrated/ridge.py` and `grams.py`,
and docs/ridge.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from safeshard import kernels
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.methods.base import Edit, Lora, Module, Served, random_key
from safeshard.streamer.methods.calibrate import KeptInputs
from safeshard.streamer.methods.shared.calibrated import CalibratedJob
from safeshard.streamer.methods.shared.leak import ladder
from safeshard.streamer.options import Finite

if TYPE_CHECKING:
    from torch import Tensor

LEAK = 0.008  # see docs/ridge.md for the study
PENALTIES = ladder(1e4, 1e-4, 8)


class Ridge(CalibratedJob, KeptInputs, Served):
    """Shrink a delta just where safe inputs excite it; of a LoRA adapter only A changes."""

    method: ClassVar[str] = "ridge"
    title: ClassVar[str] = "ridge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.12038"  # Safe Delta, whose question it answers in closed form
    takes_grams: ClassVar[bool] = True
    keeps_more: ClassVar[str] = "a higher --leak"

    leak: Finite | None = Field(
        None, gt=0, lt=1, description=f"share of the delta's energy on safe inputs to let through (default: {LEAK})"
    )
    penalty: Finite | None = Field(
        None, ge=0, le=1e4, description="in place of --leak: how much a change on safe inputs costs; 0 changes nothing"
    )
    rest: Literal["finetuned", "aligned"] = Field(
        "finetuned", description="whose embeddings, norms, biases and head to take"
    )

    @model_validator(mode="after")
    def _one_strength(self) -> Ridge:
        if self.leak is not None and self.penalty is not None:
            raise ValueError("give either --leak or --penalty")
        return self

    @property
    def runs_more(self) -> bool:
        return self.task_data is not None

    def settings(self) -> dict[str, Any]:
        found = {key: value for key, value in super().settings().items() if key not in KeptInputs.model_fields}
        return found | {"leak": self.target_leak}

    @property
    def target_leak(self) -> float | None:
        if self.penalty is not None:
            return None
        return LEAK if self.leak is None else self.leak

    @property
    def strengths(self) -> Sequence[float]:
        return PENALTIES

    @property
    def dense_scratch(self) -> int:
        return 16  # in fp32 the delta, what is written and a tile's solve; the output

    @property
    def rest_role(self) -> str:
        return self.rest

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        return {"a": module.rank, "b": module.rank} if self.rest == "aligned" else {"a": module.rank}

    def adapter_config(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
        config = super().adapter_config(adapter, ranks)
        return config if self.rest == "finetuned" else config | {"modules_to_save": None}

    def measure(self, module: Module) -> list[float]:
        assert module.grams is not None
        return module.grams.energies(module, delta_rows(module), (0.0, *self.strengths))

    def foresee(self, module: Module, *, measures: bool) -> None:
        assert module.grams is not None
        if not isinstance(module.finetuned, Lora):
            return  # rows enough of its own
        if measures:
            module.grams.expect_energies(module, delta_rows(module))
        elif penalty := self._penalty(module):
            module.grams.expect(penalty, module.finetuned.a)

    def _penalty(self, module: Module) -> float | None:
        return module.strength if self.penalty is None else self.penalty

    def edit(self, module: Module) -> Edit:
        if module.grams is None:
            return self._rest(module)
        penalty = self._penalty(module)
        assert penalty is not None
        if penalty == 0:
            energy = kernels.leak.energy(delta_rows(module), module.grams.safe)
            return self._unchanged(module, {"penalty": 0.0, "leak": 1.0, "energy": energy})
        tuned, fields = module.finetuned, {"penalty": penalty}
        if isinstance(tuned, Lora):
            found, b = module.grams.shrink(penalty, tuned.a), tuned.b.float() * tuned.scaling
            energies = (kernels.leak.lora_energy(b, inner) for inner in (found.before, found.left))
            return Edit("shrunk", {"a": found.rows, "b": tuned.b}, fields | kernels.leak.fields(*energies))
        assert module.aligned is not None
        delta = (tuned.float() - module.aligned.float()).contiguous()
        change = module.grams.ridge(penalty).apply(delta)
        seed = random_key(0, module.name)
        rows = (kernels.leak.dense_rows(delta, seed), kernels.leak.dense_rows(change, seed))
        fields |= kernels.leak.fields(*(kernels.leak.energy(each, module.grams.safe) for each in rows))
        dtype = self.dense_dtype(module.aligned)
        return Edit("shrunk", {"weight": kernels.dense.add(module.aligned, change, dtype)}, fields)

    def _rest(self, module: Module) -> Edit:
        """No decoder linear."""
        fields = {"note": "no decoder linear: --rest decides"}
        if self.rest == "finetuned":
            return self._unchanged(module, fields)
        if isinstance(module.finetuned, Lora):
            return Edit("reverted", {"a": module.finetuned.a, "b": module.finetuned.b * 0}, fields)
        assert module.aligned is not None
        return Edit("reverted", {"weight": module.aligned}, fields)

    def _unchanged(self, module: Module, fields: dict[str, Any]) -> Edit:
        tuned = module.finetuned
        tensors = {"a": tuned.a, "b": tuned.b} if isinstance(tuned, Lora) else {"weight": tuned}
        return Edit("kept", tensors, fields)


def delta_rows(module: Module) -> Tensor:
    """Rows that stand for a module's fine-tuned delta where energies are measured."""
    if isinstance(module.finetuned, Lora):
        pair = module.finetuned
        return kernels.leak.lora_rows(pair.a.float(), pair.b.float() * pair.scaling)
    assert module.aligned is not None
    delta = (module.finetuned.float() - module.aligned.float()).contiguous()
    return kernels.leak.dense_rows(delta, random_key(0, module.name))
