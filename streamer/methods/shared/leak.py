"""From the leaks of a sweep to one strength: what `--leak` asks for, over all modules of a job."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate


def strength_for(leak: float, strengths: Sequence[float], curves: Collection[Sequence[float]]) -> float:
    """The most lenient strength that lets at most `leak` through, between those that were tried, to three digits.

    Args:
        leak: a share of the delta's energy on safe inputs, over all modules.
        strengths: positive, the safest first.
        curves: of each module the energy of its delta, then what is left of it at each strength.

    The nearest end of `strengths` where all let more through, or all less.
    """
    energy, *left = (math.fsum(values) for values in zip(*curves, strict=True)) if curves else (0.0,)
    if energy == 0:
        return strengths[-1]  # nothing of the delta is excited by safe inputs
    leaks = list(accumulate((value / energy for value in left), max))
    above = next((i for i, value in enumerate(leaks) if value > leak), len(leaks))
    if above in (0, len(leaks)):
        return strengths[0 if above == 0 else -1]
    (s0, x0), (s1, x1) = ((strengths[i], leaks[i]) for i in (above - 1, above))
    if x0 == 0:
        return s0
    share = math.log(leak / x0) / math.log(x1 / x0)
    return float(f"{math.exp(math.log(s0) + share * math.log(s1 / s0)):.3g}")


def ladder(first: float, last: float, per_decade: int) -> tuple[float, ...]:
    """Strengths from `first` to `last`, both powers of ten, evenly spaced in logarithms."""
    start, stop = round(math.log10(first)), round(math.log10(last))
    steps = abs(stop - start) * per_decade
    return tuple(10 ** (start + (stop - start) * i / steps) for i in range(steps + 1))
