import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshard.manifests import Offence, RequestError, RunError, SafeshardError, printable


@given(st.text(max_size=50))
def test_printable_leaves_nothing_that_acts_on_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("größe 模型", "größe 模型"),
        ("\x1b[2Jx\r\n", r"\x1b[2Jx\r\n"),
        ("a\x9bb\u202ec\u200bd", r"a\x9bb\u202ec\u200bd"),
        ("\ud800", r"\ud800"),
        (3, "3"),
        ("x" * 401, "x" * 400 + "... (401 characters)"),
    ],
)
def test_printable_examples(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_one_offence_reads_as_one_line() -> None:
    offence = Offence("m.safetensors", "a.weight", expected="[2, 3]", got="[3, 2]", remedy="check the base model")
    text = "m.safetensors: a.weight: expected [2, 3], got [3, 2] (check the base model)"
    assert str(RequestError(offence)) == text
    assert str(Offence("--threshold", got="abc")) == "--threshold: got abc"
    assert str(Offence("--output", remedy="choose another")) == "--output (choose another)"


def test_every_offence_is_carried_and_the_listing_is_capped() -> None:
    error = RequestError([Offence(f"f{i}", "t") for i in range(23)])
    lines = str(error).splitlines()
    assert len(error.offences) == 23
    assert lines[0] == "23 problems:"
    assert lines[1:21] == [f"  - f{i}: t" for i in range(20)]
    assert lines[21:] == ["  and 3 more"]


def test_what_is_said_of_many_is_said_once() -> None:
    many = [Offence("f", f"t{i}", "F32", "I8", "convert it") for i in range(22)]
    error = RequestError([*many[:5], Offence("f", "u", "F32", "I16", "convert it"), *many[5:]])
    names = ", ".join(f"t{i}" for i in range(20))
    assert str(error).splitlines() == [
        "23 problems of 2 kinds:",
        f"  - f: expected F32, got I8 (convert it): {names} and 2 more",
        "  - f: u: expected F32, got I16 (convert it)",
    ]
    assert str(RequestError(many[:2])) == "2 problems of 1 kind:\n  - f: expected F32, got I8 (convert it): t0, t1"


def test_hostile_names_do_not_break_the_listing() -> None:
    text = str(RequestError([Offence("a\nb", "\x1b]0;t\x07", "\r", "\x00"), Offence("c")]))
    assert text.splitlines() == ["2 problems:", r"  - a\nb: \x1b]0;t\x07: expected \r, got \x00", "  - c"]
    assert str(RunError("bad\x1b", remedy="rerun\n")) == r"bad\x1b (rerun\n)"


def test_exit_statuses_and_family() -> None:
    assert RequestError(Offence("x")).exit_status == 2
    assert RunError("x").exit_status == 1
    assert issubclass(RequestError, SafeshardError)
    assert issubclass(RunError, SafeshardError)
    with pytest.raises(ValueError, match="at least one"):
        RequestError([])


@pytest.mark.parametrize("error", [RequestError([Offence("a", "b"), Offence("c")]), RunError("m", "r")])
def test_errors_survive_pickling(error: SafeshardError) -> None:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
