"""What tells the curves of a picture apart."""

from __future__ import annotations

import pytest

from safeshard.bench.tune.picture import MOST, styles


@pytest.mark.parametrize("place", [0, 7, None])
def test_no_two_methods_look_alike_and_black_is_the_baseline_s(place: int | None) -> None:
    methods = [f"method {number}" for number in range(MOST)]
    if place is not None:
        methods.insert(place, "scale")
    found = styles(methods)
    assert list(found) == methods
    assert len(set(found.values())) == len(methods)
    assert [m for m, (colour, _) in found.items() if colour == "#000000"] == ["scale"] * (place is not None)
