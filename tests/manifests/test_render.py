import re
from pathlib import Path

import pytest

from safeshard.manifests import Fallback, Input, Manifest, Method, ModuleEntry, card, render, render_summary
from safeshard.manifests.render import leak_text

KINDS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def with_modules(example: Manifest, names: list[str]) -> Manifest:
    modules = tuple(
        ModuleEntry(name=n, decision="merged" if i % 3 else "kept", cosine=-i / (len(names) + 1))
        for i, n in enumerate(names)
    )
    return example.model_copy(update={"modules": modules})


def test_the_example_looks_as_frozen(example: Manifest, data: Path) -> None:
    assert render(example, width=80) == (data / "render.txt").read_text()


def test_colour_adds_only_colour(example: Manifest) -> None:
    plain, coloured = render(example, width=80), render(example, width=80, color=True)
    assert "\x1b" not in plain
    assert ANSI.sub("", coloured) == plain
    assert "\x1b[33m 0.312 ●\x1b[0m" in coloured


def test_a_large_dense_model_fits_80_columns_in_one_table(example: Manifest) -> None:
    names = [f"model.layers.{layer}.{kind}" for layer in range(80) for kind in KINDS]
    lines = render(with_modules(example, names), width=80).splitlines()
    assert max(map(len, lines[:82])) <= 80
    assert lines[1].split() == ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [line.split()[0] for line in lines[2:82]] == [str(layer) for layer in range(80)]
    assert len({line.index("·") for line in lines[2:82:3]}) == 1


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (120, 1), (10, 7)])
def test_wide_tables_are_continued_below(example: Manifest, width: int, tables: int) -> None:
    kinds = KINDS[:4] + [f"mlp.experts.{e}.{p}_proj" for e in range(64) for p in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in kinds]
    text = render(with_modules(example, names), width=width)
    table_lines = text[: text.index("kept as fine-tuned")].splitlines()[:-1]
    assert table_lines.count("model.layers") == tables
    assert width == 10 or max(map(len, table_lines)) <= width
    assert text.count("experts.*.up_proj") == 1


def test_the_legend_explains_only_what_occurs(example: Manifest) -> None:
    legend = next(line for line in render(example, width=80).splitlines() if "merged" in line)
    assert legend == "· kept as fine-tuned    ● merged    ~ within 1e-5 of the threshold"
    assert "kept as fine-tuned" not in render(example.model_copy(update={"modules": ()}))


def test_an_empty_manifest_still_has_a_summary(example: Manifest) -> None:
    empty = example.model_copy(update={"modules": (), "tensors": (), "fallbacks": (), "inputs": {}})
    assert render(empty, width=80) == render_summary(empty) + "\n"
    assert render_summary(empty).splitlines()[1:3] == ["modules      none", "tensors      none"]


def test_many_fallbacks_are_capped(example: Manifest) -> None:
    fallbacks = tuple(Fallback(asked="a", done="b", why=f"reason {i}") for i in range(23))
    lines = render_summary(example.model_copy(update={"fallbacks": fallbacks})).splitlines()
    assert lines[-2:] == ["fallback     asked a, done b: reason 19", "fallback     and 3 more"]


def test_escape_sequences_are_neutralised(example: Manifest) -> None:
    evil = "\x1b[2J\x9b31m\u202e\n"
    hostile = example.model_copy(
        update={
            "modules": tuple(
                ModuleEntry(name=name, decision="kept", note=evil)
                for name in (evil, f"{evil}.0.q", f"layers.1.{evil}", f"layers.2.experts.3.{evil}")
            ),
            "method": Method(name=evil, paper=evil, options={evil: evil}),
            "inputs": {evil: Input(source=evil, revision=evil, files=())},
            "fallbacks": (Fallback(asked=evil, done=evil, why=evil, subject=evil),),
            "run": example.run.model_copy(update={"seconds": {evil: 1.0}}),
        }
    )
    for color in (False, True):
        text = ANSI.sub("", render(hostile, width=100, color=color)).replace("\n", "")
        assert text.isprintable()


def test_text_grows_with_the_modules_whatever_their_names(example: Manifest) -> None:
    names = [f"layers.{i}.kind_{i}" for i in range(2000)]
    assert len(render(with_modules(example, names), width=80)) < 100 * len(names)
    assert len(card(with_modules(example, names), None, "adapter")) < 100 * len(names)


@pytest.mark.parametrize(
    ("leak", "text"),
    [
        (4.03e-7, "under 0.001 %"), (1.5e-5, "0.0015 %"), (0.0, "0 %"), (0.008, "0.8 %"), (0.123456, "12.3 %"),
        (1.0, "100 %"), (12.345, "1230 %"), (0.016789, "1.68 %"),
    ],
)  # fmt: skip
def test_a_leak_is_said_without_exponent(leak: float, text: str) -> None:
    assert leak_text(leak) == text
