import json
from pathlib import Path

import pytest
import yaml

from safeshard.manifests import Input, Manifest, Method, ModuleEntry, card, printable
from safeshard.manifests.card import Kind

HOSTILE = [
    'x"\n---\nlicense: mit\n',
    "`</code><script>alert(1)</script>`",
    "[a](https://evil.example)",
    "a | b |\n| c",
    "![](https://evil.example/x.png)",
    "\x1b[31m\u202e",
    "",
    "''': {}[]&*#?|-<>=!%@\\",
]


def front_matter(text: str) -> dict[str, object]:
    _, block, _ = text.split("---\n", 2)
    loaded = yaml.safe_load(block)
    assert isinstance(loaded, dict)
    return loaded


def test_the_example_reads_as_frozen(example: Manifest, data: Path) -> None:
    assert card(example, "org/chat", "adapter") == (data / "card.md").read_text()


@pytest.mark.parametrize(
    ("kind", "library", "tags"),
    [
        ("adapter", "peft", ["safeshard", "safemerge", "lora"]),
        ("checkpoint", "transformers", ["safeshard", "safemerge"]),
    ],
)
def test_metadata(example: Manifest, kind: Kind, library: str, tags: list[str]) -> None:
    text = card(example, "org/chat", kind)
    relation = "adapter" if kind == "adapter" else "finetune"
    assert front_matter(text) == {
        "base_model": "org/chat", "base_model_relation": relation, "library_name": library, "tags": tags,
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert ("PeftModel" in text) == (kind == "adapter")
    assert "safeshard verify" in text
    assert "It does not claim that the model is safe" in text


@pytest.mark.parametrize("base", [None, "/home/me/model", "model", "../x/y", "a/b/c", "org/chat\n", 'o/"c', *HOSTILE])
def test_what_is_no_hub_id_stays_out_of_metadata_and_code(example: Manifest, base: str | None) -> None:
    text = card(example, base, "adapter")
    assert "base_model" not in front_matter(text)
    assert 'from_pretrained("path/to/the/aligned/model")' in text


def test_local_paths_are_shortened_to_the_folder(example: Manifest) -> None:
    text = card(example, None, "adapter")
    assert "`adapter`" in text
    assert "/home/someone" not in text


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_names_stay_text(example: Manifest, evil: str) -> None:
    hostile = example.model_copy(
        update={
            "modules": tuple(
                ModuleEntry(name=name or "-", decision="kept") for name in (evil, f"{evil}.0.x", f"layers.1.{evil}")
            ),
            "method": Method.model_construct(name=evil, paper=evil, options={evil: evil}, seed=None),
            "inputs": {evil: Input(source=evil, revision=evil, files=())},
            "tool": example.tool.model_copy(update={"safeshard": evil}),
        }
    )
    text = card(hostile, None, "adapter", {"license": evil, "license_name": evil, "license_link": evil})
    loaded = front_matter(text)
    assert loaded.keys() == {"library_name", "pipeline_tag", "tags"}
    assert loaded["tags"] == ["safeshard", printable(evil), "lora"]
    assert text.replace("\n", "").isprintable()
    for line in text.split("---\n", 2)[2].splitlines():
        outside = "".join(line.split("`")[::2])
        assert line.count("`") % 2 == 0 or line.startswith("```")
        assert "evil.example" not in outside
        assert "script" not in outside
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {3, 4}


def test_options_are_shown_as_json(example: Manifest) -> None:
    text = card(example, None, "adapter")
    for name, value in example.method.options.items():
        assert f"| `{name}` | `{json.dumps(value)}` |" in text


def test_the_licence_is_named(example: Manifest) -> None:
    given = {
        "license": "other",
        "license_name": "llama2",
        "license_link": "https://huggingface.co/org/m/blob/main/LICENSE",
    }
    assert given.items() <= front_matter(card(example, None, "adapter", given)).items()
    assert (
        front_matter(card(example, None, "adapter", {"license_link": "LICENSE.txt"}))["license_link"] == "LICENSE.txt"
    )
