"""Philox 4x32-10, the counter-based generator: a number depends on its key and its index, never on the order of work.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. `triton.language.philox`
computes the same words, so a Triton kernel and `philox_words` agree to the bit.

Element i of a stream is word i % 4 of counter i // 4 (its low 32 bits first; the upper half of the counter is zero).

Example: the words of key 0, counter 0 are 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox_words(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """The four words of each counter start ... start + count - 1.

    Args:
        key: 0 <= key < 2^64.

    Returns:
        count x 4, int64, each 0 <= word < 2^32.

    Raises:
        ValueError: the key is out of range.
    """
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key must lie in [0, 2^64), got {key}")
    counter = torch.arange(start, start + count, device=device)
    c0, c1 = counter & LOW, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        # The 64-bit products wrap to negative numbers; the masks below restore their high words. The low words c1, c3
        # keep surplus high bits until they are masked as part of c0, c2.
        high, low = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((low >> 32) ^ c1 ^ k0) & LOW, low, ((high >> 32) ^ c3 ^ k1) & LOW, high
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return torch.stack((c0, c1 & LOW, c2, c3 & LOW), dim=1)
