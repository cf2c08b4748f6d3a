"""What decides a calibration, and the options of `calibrate`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from safeshard.streamer.methods.shared.recipe import Published
from safeshard.streamer.options import Dtype, Finite, Folder, Options, Place

UNCUT = 1 << 20  # tokens: more than a record may have


class Sampled(Published):
    """What decides a calibration run of the aligned model, hence its Gram matrices.

    With the published recipe, prompts are made as `streamer/calibration/data/published.py` says, and the forward
    pass is in the checkpoint's dtype.
    """

    published: ClassVar[dict[str, Any]] = {"seed": 42, "max_tokens": UNCUT}

    calibration: Place | None = Field(
        None,
        description="prompts with safe answers: a file, hf://datasets/org/name/file, a URL (default: the built-in)",
    )
    samples: int = Field(
        128, gt=0, description="prompts to take, by a seeded permutation; fewer only where this is not given"
    )
    max_tokens: int = Field(512, gt=0, description="longest prompt with answer, in tokens; the rest is cut")
    seed: int = Field(0, ge=0, description="of the choice of samples")


class Calibrated(Sampled):
    """What decides the factors: shared by `safedelta` and `calibrate`."""

    percdamp: Finite = Field(0.01, gt=0, description="damping of the Gram matrices, as a fraction of the mean diagonal")


class KeptInputs(Options):
    """Data whose outputs are to stay as they are, for `ridge`."""

    task_data: Place | None = Field(None, description="prompts of the task, .jsonl; answers are not needed")
    keep_data: Place | None = Field(
        None, description="with --task-data: other prompts whose answers must stay as they are"
    )

    @model_validator(mode="after")
    def _task_first(self) -> KeptInputs:
        if self.keep_data is not None and self.task_data is None:
            raise ValueError("--keep-data goes with --task-data")
        return self


class Calibrate(Calibrated, KeptInputs):
    """Save what an aligned model's calibration gives, for any number of jobs: Gram matrices and their factors."""

    aligned: Place = Field(description="aligned model: a folder, hf://org/name@revision, or a URL")
    output: Folder = Field(description="folder to write; must not exist")
    dtype: Dtype | None = Field(None, description="dtype of the forward pass (default: the aligned checkpoint's)")
    save: Literal["both", "factors", "grams"] = Field(
        "both", description="factors are what Safe Delta reads, Grams what ridge reads; Grams take half the space"
    )

    @model_validator(mode="after")
    def _grams_of_kept_inputs(self) -> Calibrate:
        if self.task_data is not None and self.save == "factors":
            raise ValueError("--task-data gives Grams: leave out --save factors")
        return self
