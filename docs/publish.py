"""Build the site, and a distribution whose README has absolute links.

    python docs/publish.py site            # build/site/VERSION, and build/site/versions.json for the menu of versions
    python docs/publish.py dist URL        # dist/*: metadata and README with the repository's URL put in

Pages are staged first: the site's root is docs, and what else is linked from pages (README, CONTRIBUTING, benchmarks,
pictures, examples, schemas) comes along, its links rewritten. A link that leads nowhere, or to what is not published,
is an error.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "examples/README.md")
FILES = (
    "LICENSE", "CITATION.cff", "bench/results/*", "docs/**/*.png", "docs/**/*.yaml", "examples/**/*",
    "manifests/manifest.schema.json", "streamer/plan/jobs.schema.json",
)  # fmt: skip
LINK = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?(?=\))")
NOT_RUN = re.compile(r"^( *)```(\w+) not run: (.*)$", re.MULTILINE)


class DeadLinkError(Exception):
    """A link to what is not there, or not published."""


def published() -> dict[str, str]:
    """Where each published file of the repository lies in the site, by its path in the repository."""
    found = {"README.md": "index.md"}
    for pattern in (*PAGES, *FILES, "docs/**/*.md"):
        for path in sorted(p for p in ROOT.glob(pattern) if p.is_file()):
            name = path.relative_to(ROOT).as_posix()
            found[name] = name.removeprefix("docs/")
    return found


def relinked(text: str, source: str, put: Callable[[str], str]) -> str:
    """A page's text with each link to a file of the repository as `put` says, by its path there.

    Raises:
        DeadLinkError: a link leads to nothing.
    """
    below = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        start, target, anchor = match[1], match[2], match[3] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(below, target))
        if (ROOT / path).is_dir():
            path += "/README.md"
        if not (ROOT / path).is_file():
            raise DeadLinkError(f"{source}: {target}")
        return f"{start}{put(path)}{anchor}"

    return LINK.sub(link, text)


def staged(source: str, site: dict[str, str]) -> str:
    """A page as the site shows it: links within the site, and a word above commands that no test runs."""
    below = posixpath.dirname(site[source])

    def put(path: str) -> str:
        if path not in site:
            raise DeadLinkError(f"{source}: {path} is not published")
        return posixpath.relpath(site[path], below or ".")

    text = relinked((ROOT / source).read_text(), source, put)
    return NOT_RUN.sub(r"\1*Not run by the tests: \3.*\n\n\1```\2", text)


def configuration(pages: set[str]) -> dict[str, object]:
    """mkdocs.yml with folders, version and the menu of the pages that there are."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    design = sorted(page for page in pages if page.startswith("design/") and not page.endswith("README.md"))

    def kept(entries: list[dict[str, object]]) -> list[object]:
        shown: list[object] = []
        for entry in entries:
            [(title, value)] = entry.items()
            if value == "DESIGN":
                shown.append({title: ["design/README.md", *design]})
            elif isinstance(value, list):
                shown.append({title: kept(value)})
            else:
                shown.append(entry)
        return shown

    config["nav"] = kept(config["nav"])
    config["site_name"] = f"safeshard {release()}"
    config |= {"docs_dir": "pages", "site_dir": "site"}
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = ["package"]
    return dict(config)


def release() -> str:
    """The version of the package."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _copy_package(below: Path) -> None:
    """The sources by the names that they install under, for the API reference: it reads, and imports nothing."""
    ours = shutil.ignore_patterns("__pycache__", "results", "data")
    shutil.copytree(ROOT / "safeshard", below / "safeshard", ignore=ours)
    for folder in ("bench", "kernels", "manifests", "streamer"):
        shutil.copytree(ROOT / folder, below / "safeshard" / folder, ignore=ours)
    stub = below / "safeshard/streamer/api.pyi"
    stub.replace(stub.with_suffix(".py"))  # which spells the options out


def site() -> Path:
    """Stage and build; return the folder of this version."""
    stage = BUILD / "docs"
    shutil.rmtree(stage, ignore_errors=True)
    places = published()
    for source, place in places.items():
        target = stage / "pages" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if place.endswith(".md"):
            target.write_text(staged(source, places))
        else:
            shutil.copyfile(ROOT / source, target)
    (stage / "mkdocs.yml").write_text(yaml.safe_dump(configuration(set(places.values())), sort_keys=False))
    _copy_package(stage / "package")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=stage, check=True)
    here = BUILD / "site" / release()
    shutil.rmtree(here, ignore_errors=True)
    here.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(stage / "site", here)
    _list_versions(here.parent)
    return here


def _list_versions(folder: Path) -> None:
    """Name all versions that lie in `folder`, the newest first; its index leads to the newest."""
    names = sorted((p.name for p in folder.iterdir() if (p / "index.html").is_file()), key=_order, reverse=True)
    listed = [{"version": n, "title": n, "aliases": ["latest"] if n == names[0] else []} for n in names]
    (folder / "versions.json").write_text(json.dumps(listed))
    (folder / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={names[0]}/">\n')


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def distribution(repository: str) -> None:
    """Build dist/* from a copy whose README and metadata name `repository`, at the tag of this version."""
    tag, stage = f"v{release()}", BUILD / "dist"
    shutil.rmtree(stage, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        target = stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    (stage / "README.md").write_text(absolute(repository, tag))
    project = (stage / "pyproject.toml").read_text()
    urls = f'[project.urls]\nRepository = "{repository}"\nChangelog = "{repository}/blob/{tag}/CHANGELOG.md"\n'
    (stage / "pyproject.toml").write_text(project.replace("[project.scripts]", f"{urls}\n[project.scripts]", 1))
    out = ROOT / "dist"
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, stage], check=True)
    files = sorted(os.fspath(path) for path in out.glob(f"safeshard-{release()}*"))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)


def absolute(repository: str, tag: str) -> str:
    """README.md with links into the repository at a tag, pictures as raw files: as PyPI can show it."""
    kinds = {True: "raw", False: "blob"}
    return relinked(
        (ROOT / "README.md").read_text(), "README.md", lambda p: f"{repository}/{kinds[p.endswith('.png')]}/{tag}/{p}"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["site"]:
            print(site())
        case ["dist", url] if url.startswith("https://"):
            distribution(url.rstrip("/"))
        case _:
            sys.exit(__doc__)
