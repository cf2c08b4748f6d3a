import pytest

from safeshard.manifests import ModuleEntry
from safeshard.manifests.grid import arrange, cell_text


def kept(name: str) -> ModuleEntry:
    return ModuleEntry(name=name, decision="kept", cosine=0.5)


def test_layers_kinds_and_the_rest() -> None:
    modules = [kept(n) for n in ("m.layers.10.a.q", "m.layers.2.a.q", "m.layers.2.b.up", "v.blocks.0.a.q", "lm_head")]
    stacks, others = arrange(modules)
    assert [(s.prefix, s.layers, s.titles) for s in stacks] == [
        ("m.layers", (2, 10), {"a.q": "q", "b.up": "up"}),
        ("v.blocks", (0,), {"a.q": "q"}),
    ]
    assert stacks[0].cells[2, "b.up"] == (modules[2],)
    assert (10, "b.up") not in stacks[0].cells
    assert others == [modules[4]]


@pytest.mark.parametrize(
    ("kinds", "titles"),
    [
        (["attn.c_proj", "mlp.c_proj", "mlp.c_fc"], ["attn.c_proj", "mlp.c_proj", "c_fc"]),
        (["q", "a.q", "b.a.q"], ["q", "a.q", "b.a.q"]),
        (["mlp.experts.3.up", "mlp.up"], ["experts.*.up", "up"]),
        (["experts.3", "x.experts.4"], ["experts.*", "x.experts.*"]),
        (["7.up", "8.up"], ["*.up"]),
    ],
)
def test_titles_are_short_and_distinct(kinds: list[str], titles: list[str]) -> None:
    (stack,), _ = arrange([kept(f"layers.0.{kind}") for kind in kinds])
    assert list(stack.titles.values()) == titles


@pytest.mark.parametrize(
    "name", ["x", "0.x", "layers.x", "layers.3", "layers.³.x", "layers.9999999999.x", "...", "a..b"]
)
def test_names_without_a_layer_stand_alone(name: str) -> None:
    assert arrange([kept(name)]) == ([], [kept(name)])


@pytest.mark.parametrize("count", [16, 17, 2000])
def test_a_grid_of_mostly_empty_places_is_none(count: int) -> None:
    modules = [kept(f"layers.{i}.kind_{i}") for i in range(count)]
    stacks, others = arrange(modules)
    assert (len(stacks), len(others)) == ((1, 0) if count == 16 else (0, count))


def test_a_sparse_stack_leaves_the_others_alone_and_keeps_the_order() -> None:
    sparse = [kept(f"a.{i}.kind_{i}") for i in range(40)]
    stacks, others = arrange([kept("lm_head"), *sparse, kept("b.0.q"), kept("b.1.q")])
    assert [stack.prefix for stack in stacks] == ["b"]
    assert others == [kept("lm_head"), *sparse]


def test_a_name_of_endless_parts_stands_alone() -> None:
    deep = kept("layers.0." + "x." * 200_000 + "q")
    assert arrange([deep]) == ([], [deep])
    assert arrange([kept("layers.0." + "x." * 29 + "q")])[1] == []


def test_experts_of_a_layer_share_a_cell() -> None:
    modules = [kept(f"layers.1.experts.{i}.up") for i in range(3)]
    (stack,), _ = arrange(modules)
    assert stack.cells == {(1, "experts.*.up"): tuple(modules)}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ([{"decision": "merged", "cosine": 0.3123}], "0.312 ●"),
        ([{"decision": "kept", "cosine": 0.35, "near_threshold": True}], "0.350~·"),
        ([{"decision": "kept", "note": "zero delta"}], "·"),
        ([{"decision": "selected", "selected_fraction": 0.1234}], "12.3% ◆"),
        ([{"decision": "scaled"}], "◇"),
        ([{"decision": "kept", "cosine": 0.9}, {"decision": "kept", "cosine": -0.1}], "-0.100..0.900 ·2/2"),
        ([{"decision": "kept", "cosine": 0.9}, {"decision": "merged", "cosine": 0.1}], "0.100..0.900 ●1/2"),
        (
            [{"decision": "selected", "selected_fraction": f} for f in (0.5, 0.25)] + [{"decision": "reverted"}],
            "25.0%..50.0% ◆2 ○1/3",
        ),
        ([{"decision": "scaled"}] * 2, "◇2/2"),
    ],
)
def test_cells(fields: list[dict[str, object]], text: str) -> None:
    assert cell_text(tuple(ModuleEntry.model_validate({"name": "m", **f}) for f in fields)) == text
