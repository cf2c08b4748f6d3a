"""The rule that chooses a setting, and what is said of it.

Of the settings whose attack success on the validation prompts is at most the aligned model's plus a margin, take the
one of most utility; without any, the one of least attack success. It must keep more utility than `scale` does at equal
attack success, read off the curve of all factors, or the best factor is taken instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MARGIN = 2.0  # points of attack success beyond the aligned model's


@dataclass(frozen=True)
class Point:
    """What one setting of a method scores, in percent."""

    method: str
    setting: str
    attack: float
    utility: float


def choose(points: Iterable[Point], most: float) -> Point:
    """The setting of most utility among those of at most `most` percent attack success; without any, the safest.

    Of equal ones the safer, then the earlier.
    """
    found = list(points)
    safe = [point for point in found if point.attack <= most]
    if safe:
        return max(safe, key=lambda point: (point.utility, -point.attack))
    return min(found, key=lambda point: point.attack)


def scaled_utility(attack: float, curve: Sequence[tuple[float, float]]) -> float:
    """Utility of `scale` where it leaves `attack` percent: linear between factors, at least that of safer ones.

    Args:
        curve: (attack success, utility) from the aligned model over the factors to the fine-tuned one, safest first.
    """
    best = max((utility for at, utility in curve if at <= attack), default=curve[0][1])
    below = [point for point in curve if point[0] <= attack]
    above = [point for point in curve if point[0] > attack]
    if not below or not above:
        return best
    (x, y), (end, top) = below[-1], above[0]
    return max(best, y + (top - y) * (attack - x) / (end - x))


@dataclass(frozen=True)
class Choice:
    """What the rule chose, and against what."""

    chosen: Point
    best: dict[str, Point]  # of each method
    most: float  # attack success that was allowed, percent
    safe: bool  # whether the chosen setting keeps to it
    scale_beaten: bool
    scaled: float  # utility of `scale` at the equal attack success of the best other setting


def decide(points: Sequence[Point], aligned: Point, tuned: Point, margin: float = MARGIN) -> Choice:
    """Apply the rule to the validation's points, those of `scale` among them."""
    most = aligned.attack + margin
    methods = dict.fromkeys(point.method for point in points)
    best = {method: choose([p for p in points if p.method == method], most) for method in methods}
    scales = [p for p in points if p.method == "scale"]
    curve = sorted((p.attack, p.utility) for p in (aligned, *scales, tuned))
    others = [point for method, point in best.items() if method != "scale"]
    first = choose(others, most) if others else best["scale"]
    scaled = scaled_utility(first.attack, curve)
    beaten = bool(others) and first.utility > scaled
    chosen = first if beaten else best["scale"]
    return Choice(chosen, best, most, chosen.attack <= most, beaten, scaled)
