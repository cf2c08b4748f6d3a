"""Training of one stage: AdamW on answer tokens, bfloat16 products, float32 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from safeshard.bench.toy.recipes import Stage
from safeshard.bench.toy.training import NO_LOSS, Drawer, rate_factor


def train(model: Any, tokenizer: Any, stage: Stage, seed: int, say: Callable[[str], None]) -> float:
    """Train the parameters of `model` that require gradients, in place; return the last loss.

    The head, a third of this model's arithmetic, runs on answer tokens alone.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=stage.decay, betas=(0.9, 0.98))
    drawer = Drawer(stage, tokenizer, torch.Generator().manual_seed(seed))
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * rate_factor(step, stage.steps)
        ids, labels = drawer.draw()
        wanted = labels[:, 1:] != NO_LOSS
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = whole.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][wanted]
            logits = whole.lm_head(hidden)
        loss = cross_entropy(logits.float(), labels[:, 1:][wanted])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 19:
            say(f"{stage.name}: step {step + 1} of {stage.steps}, loss {loss.item():.3f}")
    model.eval()
    return loss.item()
