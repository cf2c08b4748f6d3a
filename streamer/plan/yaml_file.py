"""YAML files of users: no aliases, no repeated keys, bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from safeshard.manifests.errors import Offence, RequestError

MAX_BYTES = 4_000_000


def read_yaml(path: Path, what: str) -> Any:
    """The document of a YAML file, `what` it is in messages.

    Raises:
        RequestError: it cannot be read, is too large, or is not valid.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(Offence(str(path), "", f"at most {MAX_BYTES} bytes", f"{path.stat().st_size}"))
        return yaml.load(path.read_bytes(), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise RequestError(Offence(str(path), "", what, error.strerror or "unreadable")) from None
    except RequestError:
        raise
    except Exception as error:  # the constructors of YAML's own tags raise KeyError, IndexError, AttributeError, ...
        raise RequestError(Offence(str(path), "", "valid YAML", " ".join(str(error).split())[:300])) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (they can blow a small file up) and with unique keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[str] = set()
        for key, (position, _) in zip(keys, node.value, strict=True):
            if not isinstance(key, str) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is repeated or no name", position.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
