"""Names of operations: short ones, whatever room they lie in."""

from __future__ import annotations

from importlib import import_module

import pytest

from safeshard import kernels


@pytest.mark.parametrize("name", kernels.__all__)
def test_an_operation_has_its_short_name(name: str) -> None:
    module = getattr(kernels, name)
    assert module.__name__.rpartition(".")[2] == name
    assert import_module(module.__name__) is module
