"""Philox 4x32-10 against the published test vectors and an implementation in Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.kernels.ground.philox import philox_words

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds, from the paper's definition."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_reference_gives_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(counter, key) == words


def test_docstring_example() -> None:
    assert philox_words(0, 0, 1, CPU).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@settings(deadline=None, max_examples=50)
@given(key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**60), count=st.integers(0, 9))
def test_matches_the_reference(key: int, start: int, count: int) -> None:
    expected = [
        list(philox((counter & ONES, counter >> 32, 0, 0), (key & ONES, key >> 32)))
        for counter in range(start, start + count)
    ]
    assert philox_words(key, start, count, CPU).tolist() == expected


@pytest.mark.parametrize("key", [-1, 2**64])
def test_key_out_of_range_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\^64\)"):
        philox_words(key, 0, 1, CPU)
