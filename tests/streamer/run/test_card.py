"""The model card of an output: whose base it names, and under which licence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from safeshard.streamer import safelora, scale

COMMIT = "a" * 40


def metadata(out: Path) -> dict[str, Any]:
    loaded = yaml.safe_load((out / "README.md").read_text().split("---\n", 2)[1])
    assert isinstance(loaded, dict)
    return loaded


def test_a_folder_is_no_strangers_repository(world: Any) -> None:
    """Neither the aligned folder's name nor what a training script called its base is known to be on the Hub."""
    paths = world.trio()
    world.edit_config(paths["adapter"], base_model_name_or_path="models/llama")
    inputs = {k: paths[k] for k in ("aligned", "unaligned", "adapter")}
    safelora(**inputs, num_layers=3, output=world.root / "out", quiet=True)
    assert metadata(world.root / "out") == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["safeshard", "safelora", "lora"],
    }  # fmt: skip


@pytest.mark.parametrize("role", ["adapter", "finetuned"])
def test_a_repository_is_named_with_its_licence(world: Any, role: str) -> None:
    paths = world.trio()
    hub = world.root / "models--org--chat" / "snapshots" / COMMIT
    shutil.copytree(paths["aligned"], hub)
    card = "---\nlanguage: en\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\n---\n# Chat\nlicense: x\n"
    (hub / "README.md").write_text(card)
    (paths["unaligned"] / "README.md").write_text("---\nlicense: mit\n---\n")
    tuned = paths["adapter" if role == "adapter" else "unaligned"]
    scale(aligned=hub, **{role: tuned}, factor=0.5, output=world.root / "out", quiet=True)
    found = metadata(world.root / "out")
    assert found["base_model"] == "org/chat"
    assert found["base_model_relation"] == {"adapter": "adapter", "finetuned": "finetune"}[role]
    assert (found["license"], found["license_name"]) == ("other", "llama2")
    assert found["license_link"].startswith("https://huggingface.co/org/chat/blob/")
    assert found["license_link"].endswith("/LICENSE")
