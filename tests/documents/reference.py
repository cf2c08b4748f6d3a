"""Write what documents and editors are told about options and the manifest, made from the code.

`python tests/documents/reference.py` writes the tables between `<!-- made: ... -->` and `<!-- end -->` in docs, and
streamer/plan/jobs.schema.json; a test holds them against the code. (The table of architectures is made by
tests/streamer/calibration/sweep.py.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from safeshard.manifests import json_schema
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.base import Job, Served
from safeshard.streamer.methods.calibrate import Calibrate, KeptInputs, Sampled
from safeshard.streamer.options import RunOptions, flag
from safeshard.streamer.plan.request.jobs_schema import jobs_schema

ROOT = Path(__file__).parent.parent.parent
SCHEMA_FILE = ROOT / "streamer/plan/jobs.schema.json"
MADE = re.compile(r"(<!-- made: (?!architectures)([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ELSEWHERE: tuple[type[Any], ...] = (Job, Served, Sampled)  # options of many methods have a table of their own

# What the papers (in their letters) and the authors' scripts (as code) call an option.
PAPERS = {
    ("safemerge", "threshold"): "τ; `--cos_threshold`", ("safemerge", "weights"): "`--weighting`",
    ("safemerge", "combine"): "`--merge_type`", ("safemerge", "density"): "`--density`",
    ("safemerge", "safe_adapter"): "the safe model; `--safety_model_id`",
    ("safemerge", "unaligned"): "`--safelora_unaligned_model_id`",
    ("safelora", "threshold"): "τ; `threshold`", ("safelora", "num_layers"): "`num_proj_layers`",
    ("safelora", "unaligned"): "W unaligned; `base_model_path`",
    ("safedelta", "strength"): "s; `--s`", ("safedelta", "percdamp"): "`percdamp`",
    ("safedelta", "block_size"): "`blocksize`", ("safedelta", "samples"): "`nsamples`",
    ("resta", "gamma"): "γ", ("resta", "density"): "1-p, p being DARE's drop rate",
    ("lssf", "alpha"): "α", ("lssf", "entropy"): "η",
}  # fmt: skip


def documents() -> list[Path]:
    """The documents with tables that are made here."""
    return [page for page in sorted(ROOT.glob("docs/**/*.md")) if MADE.search(page.read_text())]


def refresh(document: Path) -> str:
    """A document's text with its tables made anew."""
    return MADE.sub(lambda match: match[1] + made(match[2]) + match[3], document.read_text())


def made(name: str) -> str:
    """The text between two markers."""
    kind, _, what = name.partition(" ")
    if kind == "options":
        return options(what)
    assert name == "manifest", name
    return manifest()


def schema() -> str:
    """The text of the jobs file's schema."""
    return json.dumps(jobs_schema(), indent=1) + "\n"


def options(what: str) -> str:
    """A table of options: of a method's own ones, or of those that many share."""
    shared: dict[str, Iterable[type[Any]]] = {
        "run": [RunOptions], "jobs": [Job], "adapters": [Served], "calibration": [Sampled, KeptInputs],
    }  # fmt: skip
    if what in shared:
        fields = {name: field for model in shared[what] for name, field in _fields(model).items()}
    else:
        model = {**METHODS, "calibrate": Calibrate}[what]
        common = {name: field for parent in ELSEWHERE for name, field in _fields(parent).items()}
        fields = {
            name: field for name, field in _fields(model).items()
            if name not in common or field.description != common[name].description
        }  # fmt: skip
    papers = {name: PAPERS[what, name] for name in fields if (what, name) in PAPERS}
    head = ["option", "default", "meaning", "in the paper; its code"]
    rows = [
        [f"`{flag(name)}`", _default(field), _cell(field.description or ""), papers.get(name, "")]
        for name, field in fields.items()
    ]
    shown = 4 if papers else 3
    return table(head[:shown], [row[:shown] for row in rows])


def _fields(model: type[Any]) -> Mapping[str, FieldInfo]:
    return dict(model.model_fields)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    text = getattr(field.default, "human_readable", None)
    return text() if text else str(field.default)


def manifest() -> str:
    """The fields of manifest.json: its own, then those of each kind of entry."""
    found = json_schema()
    parts = [("manifest.json", found), *sorted(found["$defs"].items())]
    shown = {name: entry for name, entry in parts if "properties" in entry}
    return "\n".join(_entry(name, entry, shown.keys()) for name, entry in shown.items())


def _entry(name: str, entry: Mapping[str, Any], known: Collection[str]) -> str:
    required = entry.get("required", [])
    fields = entry["properties"]
    rows = [[f"`{key}`", _kind(fields[key], known), "yes" if key in required else ""] for key in fields]
    said = entry.get("description", "").strip()
    return f"## {name}\n\n{said}\n\n{table(['field', 'type', 'always there'], rows)}"


def _kind(field: Mapping[str, Any], known: Collection[str]) -> str:
    """A type in words: links for entries, values where there are few."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name in known else "any"
    if "anyOf" in field:
        return " or ".join(_kind(each, known) for each in field["anyOf"] if each.get("type") != "null")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], known)}" if field.get("items") else "list"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"table of {_kind(values, known)}" if isinstance(values, dict) and values else "table"
    return str(field.get("type", "any"))


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def main() -> None:
    """Write all of it."""
    SCHEMA_FILE.write_text(schema())
    for document in documents():
        document.write_text(refresh(document))


if __name__ == "__main__":
    main()
