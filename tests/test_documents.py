"""What the documents point at is there, and the commands that they show are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from fences import SHELL, blocks

from safeshard.streamer.cli.app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench/README.md") if p.is_file())
BY_ENTRY_POINT = {"bench", "demo", "evaluate", "tune"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing


def test_the_readme_is_read_in_one_go() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert "```mermaid" not in text  # which PyPI does not draw


def _commands(document: Path) -> list[list[str]]:
    """Every `safeshard ...` of a document's blocks of shell, as words."""
    shown = [block.text for block in blocks(document) if block.language in SHELL]
    lines = [line.strip() for text in shown for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("safeshard ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_the_options_that_are_shown(document: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in _commands(document):
        if not words or words[0] in BY_ENTRY_POINT:
            continue
        assert words[0] in known, words
        options = {name for parameter in known[words[0]].params for name in parameter.opts + parameter.secondary_opts}
        used = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert used <= options, f"{document.name}: safeshard {words[0]}"


def test_some_commands_are_looked_at() -> None:
    assert len([words for document in DOCUMENTS for words in _commands(document)]) > 20
