"""Training of one stage: AdamW on answer tokens, seeded batches, one thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from safeshard.bench.toy.recipes import Stage
from safeshard.bench.toy.tokenizer import token_ids

WARM_UP, FLOOR = 0.05, 0.1  # shares of the steps, and of the learning rate where the cosine ends
NO_LOSS = -100


class Drawer:
    """Draws batches from a mixture: of each part its share, at least one example."""

    def __init__(self, stage: Stage, tokenizer: Any, generator: torch.Generator) -> None:
        mixture = stage.data()
        total = sum(share for share, _ in mixture)
        self._counts = [max(1, round(stage.batch * share / total)) for share, _ in mixture]
        self._parts = [token_ids(tokenizer, examples) for _, examples in mixture]
        self._pad, self._generator = tokenizer.pad_token_id, generator

    def draw(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels, each batch x length, int64; padded on the right, labels NO_LOSS outside of answers."""
        chosen: list[tuple[list[int], list[int]]] = []
        for part, count in zip(self._parts, self._counts, strict=True):
            chosen += [part[i] for i in torch.randint(len(part), (count,), generator=self._generator).tolist()]
        return collate(chosen, self._pad)


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Pairs of prompt and answer ids as padded tensors of ids and labels."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), length), pad)
    labels = torch.full((len(pairs), length), NO_LOSS)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to FLOOR."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2)


def train(model: Any, tokenizer: Any, stage: Stage, seed: int) -> float:
    """Train the parameters of `model` that require gradients, in place; return the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=stage.decay, betas=(0.9, 0.98))
    drawer = Drawer(stage, tokenizer, torch.Generator().manual_seed(seed))
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * rate_factor(step, stage.steps)
        ids, labels = drawer.draw()
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LOSS)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()
    return loss.item()
