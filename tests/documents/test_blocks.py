"""Every command that the documents show runs as it stands, on small models, or says why no test runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fences import PAGES, ROOT, SHELL, blocks, script

RUN = [page for page in PAGES if script(page)]
LANGUAGES = {*SHELL, "python", "text", "yaml", "json"}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=_name)
def test_a_page_runs_from_top_to_bottom(page: Path, small: Path, path: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "small", tmp_path / "small")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = os.environ | {
        "PATH": f"{path}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(page)], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{_name(page)}:\n{done.stdout[-4000:]}"


def test_the_pages_that_newcomers_read_are_run() -> None:
    names = {_name(page) for page in RUN}
    methods = {f"docs/{name}.md" for name in ("ridge", "safemerge", "safelora", "safedelta", "resta", "lssf", "scale")}
    assert names >= methods | {"README.md", "docs/start.md", "docs/choose.md", "docs/large.md", "docs/serve.md"}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        where = f"{_name(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block of {block.language!r}"
        shown = re.search(r"^(safeshard|pip|make|python|hf|vllm) ", block.text, re.MULTILINE)
        assert block.language in SHELL or not shown or block.language == "yaml", f"{where}: commands in another block"


def test_blocks_that_are_not_run_are_few() -> None:
    left_out = [f"{_name(page)}:{block.line}" for page in PAGES for block in blocks(page) if block.not_run]
    shell = [block for page in PAGES for block in blocks(page) if block.language in (*SHELL, "python")]
    assert len(left_out) <= len(shell) / 2, left_out
