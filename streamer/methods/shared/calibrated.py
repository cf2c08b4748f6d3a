"""What calibrated methods share: data of safe behaviour, or the factors and Grams that `calibrate` made of it."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field, model_validator

from safeshard.streamer.methods.base import Job
from safeshard.streamer.methods.calibrate import Sampled
from safeshard.streamer.options import Place, flag


class CalibratedJob(Job, Sampled):
    """A method that needs the Gram matrices of the aligned model's inputs, or their factors."""

    calibrated: ClassVar[bool] = True

    factors: Place | None = Field(None, description="folder that `calibrate` wrote, in place of --calibration")

    @model_validator(mode="after")
    def _once_calibrated(self) -> CalibratedJob:
        decided = {"calibration"} if self.runs_more else Sampled.model_fields.keys()
        if self.factors is not None and (fixed := sorted(self.model_fields_set & decided)):
            given = ", ".join(map(flag, fixed))
            raise ValueError(f"--factors were made with their own {given}: leave that to calibrate")
        return self

    @property
    def runs_more(self) -> bool:
        """Whether other data than the safe one is run, beside saved factors too."""
        return False

    def factors_key(self) -> str:
        """Equal for jobs that share a calibration, whatever their methods."""
        decisive = {"aligned", "dtype", *Sampled.model_fields} if self.factors is None else {"aligned", "factors"}
        if self.runs_more:
            decisive |= {"dtype", "task_data", "keep_data", *Sampled.model_fields}
        demanded = "samples" in self.model_fields_set
        return json.dumps([demanded, self.model_dump(mode="json", include=decisive)], sort_keys=True)

    def settings(self) -> dict[str, Any]:
        left_out = {"calibration", "factors"}
        if self.factors is not None and not self.runs_more:
            left_out |= Sampled.model_fields.keys()
        return {key: value for key, value in super().settings().items() if key not in left_out}
