"""Any model that inspect_ai has a provider for: vLLM with adapters on one base, endpoints, a mock in tests.

inspect_ai retries what may pass (rate limits, resets); what still fails comes back as an error of that answer. Keys and
addresses are the provider's own environment variables, so that none stands in a suite or a result.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeshard.bench.evaluation.engines.base import Answer
from safeshard.bench.evaluation.engines.transformers import ADAPTER
from safeshard.bench.evaluation.prompts import Message
from safeshard.bench.evaluation.suite import Sampling
from safeshard.manifests.errors import Offence, RequestError, printable
from safeshard.streamer.extras import require

SCHEME = "inspect://"
RETRIES, TIMEOUT = 5, 600  # of one answer; seconds, all attempts together


class Inspect:
    """A model of inspect_ai."""

    def __init__(self, name: str, batch: int, **arguments: Any) -> None:
        self._inspect = require("inspect_ai.model", "evaluate")
        self.batch = batch
        self._loop = asyncio.new_event_loop()
        try:
            self._model = self._inspect.get_model(name, memoize=False, **arguments)
        except Exception as error:  # an unknown provider, a package that it needs, a key that is not set
            got = printable(" ".join(str(error).split()), 300)
            self._loop.close()
            raise RequestError(Offence(f"{SCHEME}{name}", "", "a model that inspect_ai can open", got)) from error

    def answers(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        """Ask all of them at once."""
        return self._loop.run_until_complete(self._all(conversations, sampling))

    def close(self) -> None:
        """Close its connections, or its server."""
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(self._model.api.aclose())
        self._loop.close()

    async def _all(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        config = self._inspect.GenerateConfig(
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=sampling.seed,
            max_tokens=sampling.max_tokens, max_connections=self.batch, max_retries=RETRIES, timeout=TIMEOUT,
        )  # fmt: skip
        return list(await asyncio.gather(*(self._one(turns, config) for turns in conversations)))

    async def _one(self, turns: Sequence[Message], config: Any) -> Answer:
        kinds = {
            "system": self._inspect.ChatMessageSystem, "user": self._inspect.ChatMessageUser,
            "assistant": self._inspect.ChatMessageAssistant,
        }  # fmt: skip
        try:
            output = await self._model.generate([kinds[role](content=text) for role, text in turns], config=config)
        except Exception as error:  # what clients of a dozen providers raise
            return Answer(error=f"{type(error).__name__}: {printable(' '.join(str(error).split()), 300)}")
        return Answer(error=output.error) if output.error else Answer(output.completion.strip())


def vllm_name(model: str, aligned: str | None) -> str:
    """A checkpoint, or an adapter on `aligned`, as inspect_ai's vLLM provider names it."""
    if (Path(model) / ADAPTER).is_file():
        return f"vllm/{aligned}:{Path(model).absolute()}"
    return f"vllm/{model.removeprefix('hf://')}"
