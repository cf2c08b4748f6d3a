"""Fenced blocks of the documents: what is run, what is not and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "bench/README.md", "examples/README.md") for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, why no test runs it ("" where one does), its text, and its line in the page."""

    language: str
    not_run: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order.

    The info string is a language, or `LANGUAGE not run: REASON`.
    """
    found = []
    text = page.read_text()
    for match in FENCE.finditer(text):
        language, _, reason = match[2].partition(" not run: ")
        indent = len(match[1])
        body = "".join(line[indent:] for line in match[3].splitlines(keepends=True))
        found.append(Block(language.strip(), reason.strip(), body, text.count("\n", 0, match.start()) + 1))
    return found


def script(page: Path) -> str:
    """What a reader types from top to bottom: shell as it stands, Python through the interpreter."""
    parts = []
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language in SHELL:
            parts.append(f"# line {block.line}\n{block.text}")
        elif block.language == "python":
            parts.append(f"python - <<'PYTHON'\n{block.text}PYTHON\n")
    return "\n".join(parts)
