"""Cosines alone: what the gate of SafeMERGE and SafeLoRA measures, without an output."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from safeshard.streamer.methods.base import GatedJob
from safeshard.streamer.options import Folder


class Score(GatedJob):
    """cos(P delta, delta) of every module of one fine-tuned model; writes no model."""

    method: ClassVar[str] = "score"
    title: ClassVar[str] = "cosine score"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16833"

    writes_model: ClassVar[bool] = False

    output: Folder | None = Field(None, description="table to write: .csv or .json")  # type: ignore[assignment]
