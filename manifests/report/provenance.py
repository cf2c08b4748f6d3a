"""Where an output comes from, as a small graph: inputs with their hashes, the method, the files that it wrote."""

from __future__ import annotations

from dataclasses import dataclass

from safeshard.manifests.card import shown_source
from safeshard.manifests.schema import FileEntry, InputFile, Manifest
from safeshard.manifests.sizes import human

MAX_FILES = 6  # of one node
MAX_NODES = 40


@dataclass(frozen=True)
class Node:
    """A box of the graph: files by name, with size and hash."""

    name: str
    place: str
    files: tuple[tuple[str, str, str], ...]
    left_out: int


@dataclass(frozen=True)
class Provenance:
    """Inputs, what was run on them, and what came out."""

    inputs: tuple[Node, ...]
    method: str
    tool: str
    left_out: int
    manifest: str
    output: Node


def provenance(manifest: Manifest, chars: int) -> Provenance:
    """The graph; of each hash its first `chars` characters."""
    inputs = tuple(
        _node(role, shown_source(given) + (f"@{given.revision}" if given.revision else ""), given.files, chars)
        for role, given in list(manifest.inputs.items())[:MAX_NODES]
    )
    tool = manifest.tool
    return Provenance(
        inputs,
        manifest.method.name,
        f"safeshard {tool.safeshard}, torch {tool.torch or '-'}, {tool.device}",
        max(0, len(manifest.inputs) - MAX_NODES),
        (manifest.blake3 or "")[:chars],
        _node("output", "", manifest.files, chars),
    )


def _node(name: str, place: str, files: tuple[InputFile, ...] | tuple[FileEntry, ...], chars: int) -> Node:
    shown = tuple((file.name, human(file.size), _hash(file, chars)) for file in files[:MAX_FILES])
    return Node(name, place, shown, max(0, len(files) - MAX_FILES))


def _hash(file: InputFile | FileEntry, chars: int) -> str:
    if file.blake3 is not None:
        return f"BLAKE3 {file.blake3[:chars]}"
    return f"header {file.header_sha256[:chars]}" if file.header_sha256 else ""
