"""The Grams of one linear's inputs, and all that is asked of them: many deltas at many penalties.

A Cholesky costs as much as a thousand rows' solves, and a leak asks for a penalty of its own for each adapter. So LoRA
pairs take the factor R R^T = I + c0 H of a penalty near theirs, 1 or 3 times a power of ten, and go on from there: with
K = (I + c0 H)^-1 and a = c / c0

    (I + c H)^-1 = K (a + (1 - a) K)^-1,     1 / (a + (1 - a) k) = a^-1/2 (1 + 2 sum_j (-q)^j T_j(2 k - 1)),
                                             q = (1 - a^1/2) / (1 + a^1/2)

T_j being Chebyshev's polynomials; the eigenvalues k of K lie between 0 and 1. Since |q| < 0.15, ten terms are right to
fp32, in each eigendirection by itself; each but T_0 is one more solve. A penalty of 0.1, 0.3, 1, 3, ... takes none.
Adapters that share a factor are solved in one stack (`safeshard.kernels.calibrated.stacks`).

Shapes: A is r x I in its adapter's dtype, X is r x I fp32, H is I x I fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch

from safeshard.kernels.alignment.stacks import LANES
from safeshard.kernels.calibrated.ridge import Ridge, energies, ridge, spectra
from safeshard.kernels.calibrated.stacks import STACK, stacked

T = TypeVar("T")
SHARE = 48  # columns for each row of A, from which on ten solves cost less than a Cholesky
PRECISION = 2.0**-25  # of the series: half of what fp32 rounds


class Shrunk(NamedTuple):
    """The closed form of one A: X, and what tells energies: A H A^T and X H X^T (r x r, fp64)."""

    rows: torch.Tensor
    before: torch.Tensor
    left: torch.Tensor


class Asked(NamedTuple):
    """A of a LoRA pair, and a penalty."""

    penalty: float
    a: torch.Tensor

    @property
    def delta(self) -> Hashable:
        """Equal for one A, as long as it is held."""
        return self.a.data_ptr(), self.a.shape, self.a.dtype

    @property
    def key(self) -> Hashable:
        return self.penalty, self.delta


@dataclass
class Grams:
    """The Grams of one linear's inputs, and the closed form that was made of them last.

    Whoever says beforehand what it will ask for (`expect`), in the order of penalties, has each factor made once, and
    adapters solved together. What is given is the same to the bit.
    """

    safe: torch.Tensor
    keep: torch.Tensor | None = None
    _last: tuple[float, Ridge] | None = None
    _expected: list[Asked] = field(default_factory=list)
    _made: dict[Hashable, Shrunk] = field(default_factory=dict)
    _made_of: float | None = None  # the factor
    _rows: dict[int, tuple[object, torch.Tensor]] = field(default_factory=dict)
    _curves: dict[Hashable, list[float]] = field(default_factory=dict)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    def ridge(self, penalty: float) -> Ridge:
        """The closed form at one penalty; the one before it is dropped first."""
        if self._last is None or self._last[0] != penalty:
            self._last = None
            self._last = (penalty, ridge(self.safe, penalty, self.keep))
        return self._last[1]

    def expect(self, penalty: float, a: torch.Tensor) -> None:
        """Say that `shrink` will be asked for this."""
        self._expected.append(Asked(penalty, a))

    def forget(self) -> None:
        """Expect nothing any more, and remember nothing."""
        for each in (self._expected, self._made, self._rows, self._curves, self._kept):
            each.clear()

    def shrink(self, penalty: float, a: torch.Tensor) -> Shrunk:
        """X of A, and with it what else was expected of the same factor, up to STACK rows.

        Args:
            penalty: > 0, in units of the mean diagonal.
            a: r x I.
        """
        asked = Asked(penalty, a)
        if asked.key not in self._made:
            block = self._beside(asked)
            if not block:
                return self._shrink([asked])[asked.key]
            if (point := self._factor(asked)) != self._made_of:
                self._made, self._made_of = {}, point
            self._made.update(self._shrink(block))
        return self._made[asked.key]

    def expect_energies(self, owner: object, rows: torch.Tensor) -> None:
        """Say that `energies` will be asked for this owner's delta."""
        self._rows[id(owner)] = (owner, rows)

    def energies(self, owner: object, rows: torch.Tensor, penalties: Sequence[float]) -> list[float]:
        """What is left of a delta's energy at each penalty, by its spectrum; with others' that are expected.

        Args:
            owner: whose delta it is; held where it was expected.
            rows: Y of the delta, k x I fp32.
            penalties: the same for all that are expected.
        """
        if id(owner) not in self._curves:
            others = list(self._rows)
            after = others[others.index(id(owner)) :] if id(owner) in others else []
            block = dict(zip(after, _first([self._rows[each][1] for each in after]), strict=False))
            found = spectra(list(block.values()) or [rows], self.safe, self.keep)
            tried = torch.tensor(penalties, dtype=torch.float64)
            curves = [energies(each, tried).tolist() for each in found]
            if not block:
                return curves[0]
            self._curves = dict(zip(block, curves, strict=True))
        return self._curves[id(owner)]

    def inner(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Y H Y^T (k x k fp64) of each Y, k x I fp32."""
        products = stacked(matrices, lambda v: v @ self.safe, "product")
        return [product.double() @ rows.double().T for product, rows in zip(products, matrices, strict=True)]

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all who ask with one key, until `forget`."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def _factor(self, asked: Asked) -> float:
        """The penalty of the factor to take."""
        shares = self.keep is None and len(asked.a) * SHARE <= len(self.safe)
        return near(asked.penalty) if shares else asked.penalty

    def _beside(self, asked: Asked) -> list[Asked]:
        """It, and what was expected after it of the same factor; nothing where it was not expected."""
        keys = [each.key for each in self._expected]
        if asked.key not in keys:
            return []
        factor, deltas = self._factor(asked), dict[Hashable, torch.Tensor]()
        following = [
            each
            for each in self._expected[keys.index(asked.key) :]
            if self._factor(each) == factor and each.key not in self._made
        ]
        for each in following:
            deltas.setdefault(each.delta, each.a)
        room = len(_first(list(deltas.values())))
        inside = set(list(deltas)[:room])
        return [each for each in following if each.delta in inside]

    def _shrink(self, block: Sequence[Asked]) -> dict[Hashable, Shrunk]:
        """All of a block, whose factor is one."""
        point = self._factor(block[0])
        solver = self.ridge(point)
        distinct = {asked.delta: asked.a.float().contiguous() for asked in block}
        terms: dict[Hashable, dict[float, list[float]]] = {}
        for asked in block:
            ratio = 1.0 if solver.c == 0 else asked.penalty / point
            terms.setdefault(asked.delta, {})[asked.penalty] = series(ratio)
        kind = "solve" if self.keep is None else "solve, kept"
        first = stacked(list(distinct.values()), solver.apply, kind)
        solved = dict(zip(distinct, first, strict=True))
        found = {
            (penalty, delta): solved[delta] * factors[0] if len(factors) > 1 else solved[delta]
            for delta, of_delta in terms.items()
            for penalty, factors in of_delta.items()
        }
        before: dict[Hashable, torch.Tensor] = {}
        current = solved
        for j in range(1, max(len(f) for of_delta in terms.values() for f in of_delta.values())):
            going = [delta for delta, of_delta in terms.items() if any(len(f) > j for f in of_delta.values())]
            products = stacked([current[delta] for delta in going], solver.apply, kind)
            following = {}
            for delta, product in zip(going, products, strict=True):
                # T_1 = t, T_j+1 = 2 t T_j - T_j-1 with t = 2 K - 1
                turned = 2 * product - current[delta]
                following[delta] = turned if j == 1 else 2 * turned - before[delta]
                for penalty, factors in terms[delta].items():
                    if len(factors) > j:
                        found[penalty, delta] += factors[j] * following[delta]
            before, current = current, following
        whole = dict(zip(distinct, self.inner(list(distinct.values())), strict=True))
        left = self.inner(list(found.values()))
        return {
            (penalty, delta): Shrunk(rows, whole[delta], inner)
            for ((penalty, delta), rows), inner in zip(found.items(), left, strict=True)
        }


def _first(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first of some matrices, as many as a stack takes, but one at least."""
    rows = [*accumulate(-(-len(each) // LANES) * LANES for each in matrices)]
    return [each for each, total in zip(matrices, rows, strict=True) if each is matrices[0] or total <= STACK]


def near(penalty: float) -> float:
    """The nearest of 1 and 3 times a power of ten, by ratio; penalty > 0."""
    decade = math.floor(math.log10(penalty))
    points = [float(f"{digit}e{decade + more}") for more in (-1, 0, 1) for digit in (1, 3)]
    return min(points, key=lambda point: abs(math.log(penalty / point)))


def series(ratio: float) -> list[float]:
    """The factors of T_0, T_1, ... in 1 / (a + (1 - a) k) at t = 2 k - 1, as many as PRECISION takes; a = ratio > 0."""
    root = math.sqrt(ratio)
    q = (1 - root) / (1 + root)
    found = [1 / root]
    least = min(1.0, 1 / ratio)  # of what is approximated
    while 2 * abs(q) ** len(found) / root > PRECISION * least * (1 - abs(q)):
        found.append(2 * (-q) ** len(found) / root)
    return found
