"""Figures in the model card of an output of safeshard, as the Hub reads them, and `verify` stays content."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import yaml

from safeshard.bench.evaluation.figures import markdown
from safeshard.manifests.bounded import read_regular
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.evaluation import MEASURES, Evaluation
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import MANIFEST_NAME, load
from safeshard.streamer.disk import replace_file

CARD = "README.md"
MAX_CARD_BYTES = 64 << 20
BEGIN, END = "<!-- safeshard: evaluation -->", "<!-- safeshard: end of evaluation -->"
NOTE = "Figures of a suite of prompts, with what they depend on. They say nothing about other prompts."


def write(output: Path, evaluation: Evaluation, name: str) -> None:
    """Put the figures of model `name` into the card in place of earlier ones, and seal the manifest with it.

    Between the two replacements `verify` reports the card; doing it again mends that.
    """
    manifest = load(output)
    mine = evaluation.model_copy(update={"figures": tuple(evaluation.of(name))})
    data = with_figures(read(output), mine, name).encode()
    entries = [
        entry.model_copy(update={"size": len(data), "blake3": hash_bytes(data)}) if entry.name == CARD else entry
        for entry in manifest.files
    ]
    sealed = manifest.model_copy(update={"files": tuple(entries)}).sealed()
    replace_file(output / CARD, data)
    replace_file(output / MANIFEST_NAME, sealed.to_json().encode())


def read(output: Path) -> str:
    """The text of an output's card.

    Raises:
        RequestError: it is missing, a link, too large, or nothing that figures can be written into.
    """
    place = output / CARD
    try:
        if place.is_symlink():
            raise OSError(errno.ELOOP, "a link")
        text = read_regular(place, MAX_CARD_BYTES).decode()
        _parsed(text)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        got = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
        raise RequestError(Offence(str(place), "", "a model card to write figures into", got, "restore it")) from None
    return text


def _parsed(text: str) -> Any:
    """A card without the figures of an earlier evaluation."""
    from huggingface_hub import ModelCard

    return ModelCard(re.sub(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n", text, flags=re.DOTALL))


def with_figures(text: str, evaluation: Evaluation, name: str) -> str:
    """A card's text with the figures: `model-index` in its front matter, and a section at its end."""
    from huggingface_hub import EvalResult

    card = _parsed(text)
    card.data.model_name = name
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation", dataset_type=figure.part, dataset_name=figure.source,
            metric_type=figure.measure, metric_name=MEASURES[figure.measure], metric_value=round(figure.value, 4),
            metric_args={
                "low": round(figure.low, 4), "high": round(figure.high, 4), "prompts": figure.prompts,
                "ungraded": figure.ungraded, "grader": figure.grader, "sampling": figure.sampling,
                "max_tokens": figure.max_tokens,
            },
        )
        for figure in evaluation.figures
        if figure.value is not None
    ]  # fmt: skip
    section = f"\n{BEGIN}\n## Evaluation: {evaluation.suite}\n\n{markdown(evaluation)}\n{NOTE}\n{END}\n"
    return str(card).rstrip("\n") + "\n" + section
