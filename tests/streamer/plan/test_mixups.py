"""Inputs that were mixed up: what shows it is refused, what makes it likely is warned about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safeshard.manifests.errors import RequestError
from safeshard.streamer import safelora, safemerge, scale

COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture
def trio(world: Any) -> dict[str, Path]:
    paths: dict[str, Path] = world.trio()
    return paths


def cached(world: Any, folder: Path, repo: str, commit: str = COMMITS[0]) -> Path:
    """A checkpoint as the Hub's cache keeps it."""
    place: Path = world.root / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    shutil.copytree(folder, place)
    return place


def texts(inputs: dict[str, Path], out: Path, **config: Any) -> list[str]:
    """The warnings of a dry run about an adapter whose config says `config`."""
    file = inputs["adapter"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    result = safelora(**{k: inputs[k] for k in ("aligned", "unaligned", "adapter")}, num_layers=1, output=out,
                      dry_run=True, quiet=True)  # fmt: skip
    assert all(w.kind == "mix-up" for w in result.warnings)
    return [w.text for w in result.warnings]


@pytest.mark.parametrize("renamed", [True, False])
def test_the_adapter_itself_is_no_safe_adapter(world: Any, trio: dict[str, Path], renamed: bool) -> None:
    if renamed:
        shutil.copytree(trio["adapter"], world.root / "copy")
    safe = world.root / "copy" if renamed else trio["adapter"]
    with pytest.raises(RequestError, match=r"differ from --adapter, got the same weights \(check --safe-adapter\)"):
        safemerge(**trio | {"safe_adapter": safe}, output=world.root / "out", quiet=True)
    assert not (world.root / "out").exists()


def test_the_finetuned_checkpoint_itself_is_no_safe_one(world: Any) -> None:
    places = {role: world.checkpoint(role, world.llama(1, seed=i)) for i, role in enumerate(("aligned", "unaligned"))}
    tuned = world.llama(1, seed=7)
    places |= {role: world.checkpoint(role, tuned) for role in ("finetuned", "safe")}
    with pytest.raises(RequestError, match=r"differ from --finetuned, got the same weights \(check --safe\)"):
        safemerge(**places, output=world.root / "out", quiet=True)


def test_a_base_that_unaligned_is_shows_a_swap(world: Any, trio: dict[str, Path]) -> None:
    remedy = "swap --aligned and --unaligned"
    with pytest.raises(RequestError, match=remedy):
        texts(trio, world.root / "out", base_model_name_or_path=str(trio["unaligned"]))
    hub = {role: cached(world, trio[role], f"org/{role}") for role in ("aligned", "unaligned")}
    with pytest.raises(RequestError, match=remedy):
        texts(trio | hub, world.root / "out", base_model_name_or_path="Org/Unaligned")
    assert texts(trio | hub, world.root / "out", base_model_name_or_path="org/aligned") == []


def test_names_alone_are_warned_about(world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    [text] = texts(trio, out, base_model_name_or_path="meta/unaligned")
    assert text == "--adapter names meta/unaligned as its base model, which --unaligned seems to be"
    hub = trio | {"aligned": cached(world, trio["aligned"], "org/chat-8b")}
    assert texts(hub, out, base_model_name_or_path="other/model") == [
        "--adapter names other/model as its base model, --aligned is org/chat-8b"
    ]
    for fine in ("/scratch/me/aligned", "", None, "other/model"):  # of a local folder no id is known
        assert texts(trio, out, base_model_name_or_path=fine) == []
    for copy in ("unsloth/chat-8b-bnb-4bit", "mirror/Chat-8B", "/data/chat-8b/"):
        assert texts(hub, out, base_model_name_or_path=copy) == []


def test_revisions_tell_two_of_one_repository_apart(world: Any, trio: dict[str, Path]) -> None:
    hub = trio | {role: cached(world, trio[role], "org/m", c) for role, c in zip(trio, COMMITS, strict=False)}
    base, out = {"base_model_name_or_path": "org/m"}, world.root / "out"
    assert texts(hub, out, **base) == []
    assert texts(hub, out, **base, revision=COMMITS[0]) == []
    with pytest.raises(RequestError, match="swap --aligned and --unaligned"):
        texts(hub, out, **base, revision=COMMITS[1])
    [text] = texts(hub, out, **base, revision="c" * 40)
    assert text == f"--adapter was trained on revision {'c' * 40} of org/m, --aligned is at {COMMITS[0]}"


@pytest.mark.parametrize(
    ("ours", "theirs", "warned"),
    [
        ({"model_type": "llama"}, {"model_type": "mistral"}, True),
        ({"model_type": "llama"}, {"model_type": "llama"}, False),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, {"model_type": "gemma3_text"}, False),
    ],
)
def test_model_types(world: Any, ours: dict[str, Any], theirs: dict[str, Any], warned: bool) -> None:
    aligned, tuned = (world.checkpoint(name, world.llama(1, seed=i), **config)
                      for i, (name, config) in enumerate((("aligned", ours), ("tuned", theirs))))  # fmt: skip
    result = scale(aligned=aligned, finetuned=tuned, factor=0.5, output=world.root / "out", dry_run=True, quiet=True)
    assert [w.text for w in result.warnings] == [
        "--finetuned is a mistral by its config.json, --aligned a llama"
    ] * warned
