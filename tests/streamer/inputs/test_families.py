"""The table of families against its documentation, and against what transformers builds."""

from __future__ import annotations

import math
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.manifests.safetensors_header import ITEM_BITS, TensorRef
from safeshard.streamer.inputs.layouts import FAMILIES, Modules

DOCS = Path(__file__).parents[3] / "docs/experts.md"


def test_the_documentation_names_every_family_under_its_layout() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| fused")]
    documented = {kind: row for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert documented.keys() == FAMILIES.keys()
    for kind, row in documented.items():
        family = FAMILIES[kind]
        assert ("transposed" in row, "in turns" in row) == (family.transposed, family.interleaved), kind


NAMES = st.sampled_from(
    [f"model.layers.0.mlp.experts{middle}{tail}" for middle in ("", ".0", ".7.up_proj", ".gate_up_proj", ".down_proj")
     for tail in ("", ".weight", ".weight_scale", ".weight_scale_inv", "_scale_inv", "_blocks", "_scales",
                  ".weight_packed", ".qweight", ".SCB", ".weight_scale_2", "_bias")]
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 8, 16, 32, 10**9]), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(ITEM_BITS)), SHAPES), max_size=8)
KEYS = ("weights", "group_0", "num_bits", "group_size", "type", "weight_block_size")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 200) | st.sampled_from(["float", "ue8m0", "fp8", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS), inner, max_size=3
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    given=TENSORS, kind=st.sampled_from([*FAMILIES, "other", ""]), hidden=st.sampled_from([None, 8, 32, "x"]),
    said=st.dictionaries(st.sampled_from(["config_groups", "weight_block_size", "num_bits", "scale_fmt"]), VALUES),
)  # fmt: skip
def test_any_header_is_read_or_refused(
    given: dict[str, tuple[str, tuple[int, ...]]], kind: str, hidden: object, said: dict[str, object]
) -> None:
    """Whatever names, dtypes, shapes and configurations say: no error, and what is found lies inside its tensor."""
    refs = {}
    for name, (dtype, shape) in given.items():
        count = math.prod(shape)
        refs[name] = TensorRef(name, dtype, shape, "f", 8, count * ITEM_BITS[dtype] // 8)
    modules = Modules(refs, {"model_type": kind, "hidden_size": hidden, "quantization_config": said}, False)
    assert len(modules.names) <= 3 * 4096 * 4
    for name in modules.names[:50]:
        found = modules.find(name)
        assert found is not None, name
        for ref in found.refs():
            whole = refs[ref.name]
            assert whole.offset <= ref.offset
            assert ref.offset + ref.nbytes <= whole.offset + whole.nbytes
    for module in ("model.layers.0.mlp.experts.3.gate_up_proj", "model.layers.0.mlp.experts.0.w1"):
        modules.find(module)
        modules.reason(module)
