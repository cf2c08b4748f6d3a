"""What every engine does: answer a batch of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from safeshard.bench.evaluation.prompts import Message
from safeshard.bench.evaluation.suite import Sampling


@dataclass(frozen=True)
class Answer:
    """A model's text, or why there is none."""

    text: str = ""
    error: str = ""


class Engine(Protocol):
    """One model, ready to be asked."""

    batch: int  # conversations that are asked together; answers may depend on who shares a batch, to a rounding

    def answers(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        """Answer each conversation; `sampling.seed` decides what is drawn."""

    def close(self) -> None:
        """Let go of the model."""


class InProcess:
    """A function of this process as an engine."""

    def __init__(self, function: Callable[[Sequence[Sequence[Message]], Sampling], Sequence[str]], batch: int) -> None:
        self._function, self.batch = function, batch

    def answers(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        """Call the function."""
        return [Answer(text) for text in self._function(conversations, sampling)]

    def close(self) -> None:
        """Nothing to let go of."""
