"""The model card of an output: README.md for the Hub, YAML front matter included.

Names come from files that others wrote. In YAML they are double-quoted scalars, in Markdown they stand in code spans,
where neither markup, HTML nor links are interpreted.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Literal

from safeshard.manifests.errors import printable
from safeshard.manifests.grid import MARKS, MEANINGS, NEAR, Stack, arrange, cell_text, effect_text, number_name
from safeshard.manifests.render import caution_text
from safeshard.manifests.schema import MANIFEST_NAME, Input, Manifest, Method, ModuleEntry

Kind = Literal["adapter", "checkpoint"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN_LINK = re.compile(r"https://[\w./-]+", re.ASCII)

_LOADING = {
    "adapter": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")""",
    "checkpoint": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")""",
}


def card(
    manifest: Manifest, base_model: str | None, kind: Kind, licence: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The text of README.md. `base_model` enters the metadata only if it is a Hub id (`org/name`).

    `licence` has the fields `license`, `license_name` and `license_link`, as far as the inputs' cards state them.

    Nothing of `manifest.files`, `tensors` and `run` is used, so the card can be written, and hashed into the manifest,
    before those are complete.
    """
    base = base_model if base_model is not None and _HUB_ID.fullmatch(base_model) else None
    blocks = [
        _front_matter(manifest, base, kind, licence),
        f"# {_code(manifest.method.name)} {kind}",
        _opening(manifest, kind),
        "## Method",
        f"{_code(manifest.method.name)}, {_said_of(manifest.method)}. Options as resolved, defaults included:",
        _options(manifest),
        "## Inputs",
        _table(["role", "source", "revision"], (_input_row(*item) for item in manifest.inputs.items())),
        "## Decisions",
        *_decisions(manifest),
        "## Loading",
        f"```python\n{_LOADING[kind].format(base=json.dumps(base or 'path/to/the/aligned/model'))}\n```",
        "## Verification",
        f"`{MANIFEST_NAME}` records every decision and the hash of every tensor. To compare this folder with it:",
        "```\nsafeshard verify path/to/this/folder\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _said_of(method: Method) -> str:
    """Where a method is published; ridge is not, and its link leads to the method whose question it answers."""
    return f"which answers the question of {_link(method.paper)}" if method.name == "ridge" else _link(method.paper)


def _front_matter(manifest: Manifest, base: str | None, kind: Kind, licence: Mapping[str, str]) -> str:
    from huggingface_hub import ModelCardData  # only where a card is written: it takes its time

    tags = ["safeshard", printable(manifest.method.name), *(["lora"] if kind == "adapter" else [])]
    link = licence.get("license_link", "")
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if kind == "adapter" else "finetune",
        library_name="peft" if kind == "adapter" else "transformers",
        license=_slug(licence.get("license")),
        license_name=_slug(licence.get("license_name")),
        license_link=link if PLAIN_LINK.fullmatch(link) or _slug(link) else None,
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _slug(text: str | None) -> str | None:
    """A short word without markup, as licences are named; None for anything else, which others wrote."""
    return text if text is not None and re.fullmatch(r"[\w.-]{1,64}", text, re.ASCII) else None


def _opening(manifest: Manifest, kind: Kind) -> str:
    return (
        f"This {kind} was written by safeshard {_code(manifest.tool.safeshard)}, which applied the method "
        f"{_code(manifest.method.name)} to a fine-tuned model. It does not claim that the model is safe. "
        "Evaluate it for your use."
    )


def _options(manifest: Manifest) -> str:
    seed = {"seed": manifest.method.seed} if manifest.method.seed is not None else {}
    options = manifest.method.options | seed
    return _table(["option", "value"], ([_code(name), _code(json.dumps(value))] for name, value in options.items()))


def _input_row(role: str, given: Input) -> list[str]:
    return [_code(role), _code(shown_source(given)), _code(given.revision) if given.revision else ""]


def shown_source(given: Input) -> str:
    """An input's source for readers elsewhere: a folder's full path says more about a machine than they should know."""
    return PurePath(given.source).name if PurePath(given.source).is_absolute() else given.source


def _decisions(manifest: Manifest) -> list[str]:
    modules = manifest.modules
    counts = Counter(module.decision for module in modules)
    summary = _table(
        ["decision", "modules"],
        ([f"{MARKS[d]} {MEANINGS[d]}", str(counts[d])] for d in MARKS if d in counts),
    )
    if effect := effect_text(manifest.effect):
        summary += f"\n\n{effect}."
    summary += "".join(f"\n\n**Warning:** {_code(caution_text(each))}" for each in manifest.warnings or ())
    stacks, others = arrange(modules)
    tables = [_grid(stack) for stack in stacks]
    if others:
        tables.append(_table(["module", ""], ([_code(m.name), cell_text((m,))] for m in others)))
    details = f"<details><summary>Every module</summary>\n\n{_key(modules)}\n\n"
    return [summary, details + "\n\n".join(tables) + "\n\n</details>"] if tables else [summary]


def _key(modules: tuple[ModuleEntry, ...]) -> str:
    return f"Each cell: {number_name(modules)} and decision; `{NEAR}` marks a cosine within 1e-5 of the threshold."


def _grid(stack: Stack) -> str:
    rows = (
        [str(layer), *(_cell(stack.cells.get((layer, kind), ())) for kind in stack.titles)] for layer in stack.layers
    )
    return f"{_code(stack.prefix)}\n\n" + _table(["layer", *map(_code, stack.titles.values())], rows)


def _cell(modules: tuple[ModuleEntry, ...]) -> str:
    return cell_text(modules).replace(NEAR, f"\\{NEAR}") if modules else ""


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: object) -> str:
    """A code span; a backtick would end it and a pipe would end a table's cell, so both are escaped."""
    content = printable(text).replace("`", r"\x60").replace("|", r"\x7c")
    return f"`{content or ' '}`"


def _link(text: str) -> str:
    return f"<{text}>" if PLAIN_LINK.fullmatch(text) else _code(text)
