"""Calibration samples as padded batches, and host memory for what is known of each of their positions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.streamer.calibration.hidden_states import SPILL
from safeshard.streamer.disk import reserve
from safeshard.streamer.pinned import host_memory


@dataclass(frozen=True)
class Batch:
    """Samples run together, padded on the right to the longest.

    `samples` are their places in the calibration data; `tokens` and `mask` are len(samples) x length, `rows` are the
    places of the tokens that are not padding once both are flattened; all int64.
    """

    samples: list[int]
    tokens: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor


def check_lengths(folder: Path, tokens: Sequence[Sequence[int]], longest: int | None) -> None:
    """RequestError for no samples, empty ones, or one of more tokens than the model takes (`longest`)."""
    if not tokens or not all(tokens):
        raise RequestError(Offence("calibration data", expected="samples of at least one token", got="none"))
    if longest is not None and (got := max(map(len, tokens))) > longest:
        where, key = str(folder / "config.json"), "max_position_embeddings"
        raise RequestError(Offence(where, key, f"{got} or more", str(longest), "lower --max-tokens"))


def cut(tokens: Sequence[Sequence[int]], batch_tokens: int) -> list[Batch]:
    """Samples in order of length, so that little padding is run, cut where a batch would exceed `batch_tokens`."""
    groups: list[list[int]] = []
    for sample in sorted(range(len(tokens)), key=lambda sample: len(tokens[sample])):
        if groups and (len(groups[-1]) + 1) * len(tokens[sample]) <= batch_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [_pad(group, [tokens[sample] for sample in group]) for group in groups]


def _pad(samples: list[int], tokens: list[Sequence[int]]) -> Batch:
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(tokens):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return Batch(samples, ids, mask, mask.flatten().nonzero().flatten())


def host_buffer(numel: int, dtype: torch.dtype, budget_bytes: int, folder: Path, pinned: bool = False) -> torch.Tensor:
    """A flat host tensor, in memory where it fits the budget, else mapped from a file that vanishes with it."""
    nbytes = numel * dtype.itemsize
    if nbytes <= budget_bytes:
        return host_memory(nbytes, pinned=pinned).view(dtype) if pinned else torch.empty(numel, dtype=dtype)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=SPILL[0], suffix=SPILL[1]) as file:
            reserve(file.fileno(), nbytes)  # now: a full disk would otherwise kill the process at some write
            # The mapping outlives the name, so nothing is left behind however the process ends.
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        remedy = "free disk space, raise --memory, or take fewer samples"
        raise RunError(f"no room for {nbytes} bytes of hidden states in {folder}: {error}", remedy) from error
