"""A model of a disk behind a cache: what a power cut may leave of the calls that a shim has logged.

File data lasts once the file is synced, a name once its folder is; what is not synced may be lost, wholly or in part.
Names change in order: where an unsynced one has come through, those before it have too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Node:
    """A file (`data`) or a folder (`names`), as the kernel shows it, with what of it is synced."""

    def __init__(self, is_folder: bool, data: bytes = b"") -> None:
        self.is_folder, self.names = is_folder, {} if is_folder else None
        self.data, self.synced = bytearray(data), bytes(data)
        self.pending: list[tuple[int, bytes | None]] = []  # writes (offset, data), and sizes (size, None)


class Disk:
    """Starts as the folder `root` is now, all of it synced."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Node(True)
        self._start: dict[int, dict[str, Node]] = {}
        self._changes: list[tuple[list[tuple[Node, str, Node | None]], list[bool]]] = []  # (folder, name, node), synced
        self._load(root, self.top)

    def _load(self, path: Path, node: Node) -> None:
        for child in sorted(path.iterdir()):
            new = Node(child.is_dir(), b"" if child.is_dir() else child.read_bytes())
            node.names[child.name] = new
            if new.is_folder:
                self._load(child, new)
        self._start[id(node)] = dict(node.names)

    def _find(self, path: str) -> Node:
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.names[part]
        return node

    def _change(self, *changes: tuple[str, Node | None]) -> None:
        """Set or remove names, at once."""
        links = [(self._find(str(Path(path).parent)), Path(path).name, node) for path, node in changes]
        for folder, name, node in links:
            if node is None:
                del folder.names[name]
            else:
                folder.names[name] = node
        self._changes.append((links, [False]))

    def apply(self, entry: list[Any]) -> None:
        """Let one logged call take effect."""
        kind, path, *args = entry
        if kind == "open":
            existed, truncates = args
            if not existed:
                self._change((path, Node(False)))
            elif truncates:
                self.apply(["size", path, 0])
        elif kind == "mkdir":
            self._change((path, Node(True)))
        elif kind in ("unlink", "rmdir"):
            self._change((path, None))
        elif kind == "rename":
            node = self._find(path)
            self._change((path, None), (args[0], node))
        elif kind == "fsync":
            self._sync(self._find(path))
        else:
            node = self._find(path)
            change = (args[0], args[1].encode("latin-1")) if kind == "write" else (args[0], None)
            node.pending.append(change)
            _put(node.data, *change)

    def _sync(self, node: Node) -> None:
        if node.is_folder:
            for links, synced in self._changes:
                synced[0] = synced[0] or any(folder is node for folder, _, _ in links)
        node.synced, node.pending = bytes(node.data), []

    def tree(self) -> dict[str, bytes]:
        """All files as a process sees them: path below the root -> content."""
        return {path: bytes(node.data) for path, node in _walk(self.top, lambda node: node.names)}

    def cut_power(self, mode: str, dice: random.Random) -> None:
        """Make the real folder what may be left.

        `mode` is "lost": nothing unsynced is; "names": all names and sizes are, and no data; "mixed": by the dice.
        """
        through = {"lost": 0, "names": len(self._changes)}.get(mode, dice.randint(0, len(self._changes)))
        names = {key: dict(value) for key, value in self._start.items()}
        for number, (links, synced) in enumerate(self._changes):
            if synced[0] or number < through:
                for folder, name, node in links:
                    names.setdefault(id(folder), {}).pop(name, None)
                    if node is not None:
                        names[id(folder)][name] = node
        for path, node in _walk(self.top, lambda node: names.get(id(node), {}), folders=True):
            target = self.root / path
            if node.is_folder:
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.write_bytes(_remains(node, mode, dice))


def _remains(node: Node, mode: str, dice: random.Random) -> bytes:
    data = bytearray(node.synced)
    if mode == "names":
        _put(data, len(node.data), None)
    elif mode == "mixed":
        _put(data, max(len(data), len(node.data)), None)
        for offset, written in node.pending:
            fate = dice.choice(["whole", "torn", "lost"])
            if fate == "whole" or (written is None and fate == "torn"):
                _put(data, offset, written)
            elif fate == "torn" and written:
                _put(data, offset, written[: dice.randint(0, len(written))])
    return bytes(data)


def _put(data: bytearray, offset: int, written: bytes | None) -> None:
    if written is None:
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    else:
        data.extend(bytes(max(0, offset + len(written) - len(data))))
        data[offset : offset + len(written)] = written


def _walk(node: Node, names: Any, prefix: str = "", folders: bool = False) -> Iterator[tuple[str, Node]]:
    for name, child in sorted(names(node).items()):
        if not child.is_folder or folders:
            yield prefix + name, child
        if child.is_folder:
            yield from _walk(child, names, f"{prefix}{name}/", folders)
