"""What decides a calibration, and the options of `calibrate`."""

from __future__ import annotations

from pydantic import Field

from safeshard.streamer.options import Dtype, Finite, Folder, Options, Place


class Calibrated(Options):
    """What decides the calibration, hence the factors: shared by `safedelta` and `calibrate`."""

    calibration: Place | None = Field(
        None, description="prompts with safe answers, .jsonl (default: the built-in refusals)"
    )
    samples: int = Field(128, gt=0, description="prompts to take, by a seeded permutation")
    max_tokens: int = Field(512, gt=0, description="longest prompt with answer, in tokens; the rest is cut")
    seed: int = Field(0, ge=0, description="of the choice of samples")
    percdamp: Finite = Field(0.01, gt=0, description="damping of the Gram matrices, as a fraction of the mean diagonal")


class Calibrate(Calibrated):
    """Save the factors of an aligned model's Gram matrices, for any number of Safe Delta jobs."""

    aligned: Place = Field(description="aligned model: a folder, hf://org/name@revision, or a URL")
    output: Folder = Field(description="folder to write; must not exist")
    dtype: Dtype | None = Field(None, description="dtype of the forward pass (default: the aligned checkpoint's)")
