import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from safeshard.manifests import (
    FileEntry,
    Manifest,
    Method,
    ModuleEntry,
    RequestError,
    TensorEntry,
    json_schema,
    load,
)
from safeshard.manifests.verify import verify

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
reals = st.floats(allow_nan=False, allow_infinity=False)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
decisions = st.sampled_from(["kept", "merged", "projected", "selected", "scaled", "reverted"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | reals | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
modules = st.builds(
    ModuleEntry,
    name=names,
    decision=decisions,
    cosine=st.none() | reals,
    near_threshold=st.none() | st.booleans(),
    weights=st.none() | st.lists(reals, max_size=3).map(tuple),
    rank=st.none() | st.integers(0, 2**40),
    note=st.none() | names,
)
tensors = st.builds(
    TensorEntry,
    name=names,
    file=st.just("m.safetensors"),
    dtype=st.sampled_from(["BF16", "F32"]),
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    action=st.sampled_from(["copied", "edited", "new"]),
    blake3=hashes,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(modules, max_size=4, unique_by=lambda m: m.name).map(tuple),
    st.lists(tensors, max_size=4, unique_by=lambda t: t.name).map(tuple),
    st.dictionaries(names, values, max_size=4),
    st.integers(0, 2**60),
)
def test_round_trip(
    modules: tuple[ModuleEntry, ...], tensors: tuple[TensorEntry, ...], options: dict[str, Any], size: int
) -> None:
    manifest = Manifest.from_json(EXAMPLE).model_copy(
        update={
            "modules": modules,
            "tensors": tensors,
            "files": (FileEntry(name="m.safetensors", size=size, header_sha256="0" * 64),),
            "method": Method(name="m", paper="p", options=options),
        }
    )
    text = manifest.to_json()
    again = Manifest.from_json(text)
    assert again == manifest.sealed()
    assert again.to_json() == text
    assert text.isascii()
    assert text.endswith("}\n")
    assert again.blake3 == again.content_hash()


EXAMPLE = (Path(__file__).parent / "data" / "manifest.json").read_text()


def test_the_example_is_written_as_frozen(example: Manifest) -> None:
    assert example.to_json() == EXAMPLE


def test_a_file_or_its_folder_can_be_loaded(data: Path, example: Manifest) -> None:
    assert load(data) == load(data / "manifest.json") == example.sealed()


def test_none_is_left_out_but_for_options(example: Manifest) -> None:
    document = json.loads(example.to_json())
    assert document["method"]["options"]["density"] is None
    assert document["modules"][-1] == {
        "name": "lm_head",
        "decision": "kept",
        "threshold": 0.35,
        "note": "the delta is zero",
    }


def test_the_seal_depends_on_the_content_and_not_on_its_layout(example: Manifest) -> None:
    compact = Manifest.from_json(json.dumps(json.loads(EXAMPLE), sort_keys=True))
    assert compact.blake3 == compact.content_hash() == example.content_hash()
    edited = Manifest.from_json(EXAMPLE.replace("0.5201", "0.5202"))
    assert edited.blake3 != edited.content_hash()


def test_the_exported_schema_is_current() -> None:
    exported = files("safeshard.manifests").joinpath("manifest.schema.json").read_text()
    assert json.loads(exported) == json_schema(), "export json_schema() to manifests/manifest.schema.json again"


def test_the_exported_schema_is_closed_and_names_the_version() -> None:
    schema = json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert all(o["additionalProperties"] is False for o in objects if o.get("type") == "object")
    assert schema["properties"]["schema"]["const"] == "safeshard.manifest/1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_value_that_json_lacks(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        ModuleEntry(name="m", decision="kept", cosine=value)
    with pytest.raises(ValidationError, match="finite"):
        Method(name="m", paper="p", options={"a": [value]})


def test_entries_are_frozen_and_closed() -> None:
    entry = ModuleEntry(name="m", decision="kept")
    with pytest.raises(ValidationError, match="frozen"):
        entry.cosine = 1.0
    with pytest.raises(ValidationError, match="Extra inputs"):
        ModuleEntry.model_validate({"name": "m", "decision": "kept", "cosin": 1.0})
    with pytest.raises(ValidationError, match="either"):
        FileEntry(name="f", size=1)


@pytest.mark.parametrize(
    ("old", "new", "field", "expected"),
    [
        ('"size": 4096', '"size": "4096"', "inputs.aligned.files.0.size", "integer"),
        ('"size": 4096', '"size": -1', "inputs.aligned.files.0.size", "greater than or equal to 0"),
        ("manifest/1", "manifest/2", "schema", "'safeshard.manifest/1'"),
        ('"wall_s": 3.5', '"wall_s": 3.5, "x": 1', "run.x", "Extra inputs"),
        ('"wall_s": 3.5', '"wall_s": 1e999', "run.wall_s", "finite"),
        ('"wall_s": 3.5', '"wall_s": NaN', "", "JSON"),
        ('"wall_s": 3.5', '"wall_s": 3.5, "wall_s": 4', "", "JSON"),
        ('"decision": "merged"', '"decision": "burnt"', "modules.0.decision", "'kept'"),
        ("1" * 64, "1" * 63, "inputs.aligned.files.0.header_sha256", "pattern"),
        ('"name": "lm_head"', '"name": "model.layers.0.mlp.up_proj"', "", "module named twice"),
        ('"file": "adapter_model', '"file": "other_model', "", "no header_sha256 for 'other_model.safetensors'"),
        (EXAMPLE[20:], "", "", "JSON"),
        (EXAMPLE, "[" * 100_000, "", "JSON"),
        (EXAMPLE, "[]", "", "object"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, field: str, expected: str) -> None:
    assert old in EXAMPLE
    with pytest.raises(RequestError) as caught:
        Manifest.from_json(EXAMPLE.replace(old, new, 1), where="out/manifest.json")
    offence = caught.value.offences[0]
    assert offence.where == "out/manifest.json"
    assert offence.what == field
    assert expected in offence.expected


def test_no_manifest_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"manifest\.json: expected a manifest, got No such file"):
        load(tmp_path)


def test_an_unfinished_output_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    again = r"\(run its command again.*\)$"
    with pytest.raises(RequestError, match=rf"out\.partial: expected a finished output, got an unfinished one {again}"):
        load(tmp_path / "out.partial")
    with pytest.raises(RequestError, match=rf"out: expected a finished output.*/out\.partial {again}"):
        load(tmp_path / "out")
    with pytest.raises(RequestError, match=r"out: expected a finished output"):
        verify(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(RequestError, match="in JSON"):
        load(tmp_path / "out")


def test_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, safeshard.manifests; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
