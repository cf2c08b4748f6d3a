"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

Z = 1.959963984540054  # of 95 % between two sides


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); (0, 1) of nothing.

    wilson(8, 10) = (0.490, 0.943).
    """
    if not total:
        return 0.0, 1.0
    share, z2 = successes / total, Z * Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # at 0 and at 1 the bound is exact, whatever the rounding
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == total else middle + half)


def interval(values: Sequence[float], missing: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval of values between 0 and 1, of which `missing` more are not known.

    Of zeros and ones the interval is Wilson's, of other scores the normal one. What is missing widens it: to the lower
    bound if all of them were 0, and to the upper one if all were 1.
    """
    if not values:
        return math.nan, 0.0, 1.0
    total = len(values) + missing
    if set(values) <= {0.0, 1.0}:
        return mean(values), wilson(sum(values), total)[0], wilson(sum(values) + missing, total)[1]
    bounds = []
    for filled in ([*values, *[0.0] * missing], [*values, *[1.0] * missing]):
        half = Z * stdev(filled) / math.sqrt(len(filled)) if len(filled) > 1 else 1.0
        bounds.append((mean(filled) - half, mean(filled) + half))
    return mean(values), max(0.0, bounds[0][0]), min(1.0, bounds[1][1])
