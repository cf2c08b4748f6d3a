"""What SafeMERGE's options say of each other."""

from __future__ import annotations

import pytest

from safeshard.manifests.errors import RequestError
from safeshard.streamer.methods.safemerge import SafeMerge
from safeshard.streamer.options import build

GIVEN = {"aligned": "a", "unaligned": "u", "output": "o"}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (("adapter",), "--safe-adapter"),
        (("adapter", "safe"), "--safe-adapter"),
        (("finetuned",), "--safe"),
        (("finetuned", "safe", "safe_adapter"), "--adapter"),
    ],
)
def test_what_is_missing_is_named(given: tuple[str, ...], missing: str) -> None:
    with pytest.raises(RequestError) as caught:
        build(SafeMerge, GIVEN | dict.fromkeys(given, "x"))
    assert str(caught.value).startswith(f"{missing} is missing: --")
