"""Which engine answers for a model, what decides its answers, and what is wrong with it before it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from safeshard.bench.evaluation.engines.base import Answer, Engine
from safeshard.bench.evaluation.engines.inspect import SCHEME, Inspect, vllm_name
from safeshard.bench.evaluation.engines.transformers import ADAPTER, Loader
from safeshard.bench.evaluation.prompts import Message
from safeshard.bench.evaluation.suite import Sampling
from safeshard.manifests.errors import Offence

Kind = Literal["transformers", "vllm"]
WEIGHTS = "adapter_model.safetensors"
HUB_NAME = re.compile(r"(hf://)?[\w.-]+/[\w.-]+(@[\w.-]+)?")


class Engines:
    """Opens models; local ones by `kind`, `inspect://...` through inspect_ai."""

    def __init__(self, kind: Kind, device: str, batch: int) -> None:
        self.kind, self.batch = kind, batch
        self._loader = Loader(device, batch)

    def open(self, model: str, aligned: str | None) -> Engine:
        """Load or connect.

        Raises:
            RunError: it does not load.
            RequestError: inspect_ai knows no such model.
        """
        if model.startswith(SCHEME):
            return Inspect(model.removeprefix(SCHEME), self.batch)
        if self.kind == "vllm":
            return Inspect(vllm_name(model, aligned), self.batch)
        return self._loader.open(model, aligned)

    def lazy(self, model: str, aligned: str | None) -> Lazy:
        """The same, at the first question: where all is known already no model is loaded."""
        return Lazy(lambda: self.open(model, aligned), self.batch)

    def identity(self, model: str, aligned: str | None) -> Any:
        """What decides a model's answers, as JSON values."""
        if model.startswith(SCHEME):
            return ["inspect", model]
        base = _files(aligned) if aligned is not None and is_adapter(model) else None
        packages = ["torch", "transformers", "peft"] if self.kind == "transformers" else ["vllm"]
        return [self.kind, self.batch, _files(model), base, versions(packages)]

    def offences(self, model: str, aligned: str | None) -> Iterator[Offence]:
        """What is wrong with a model, as far as its folder shows."""
        folder = Path(model)
        if model.startswith(SCHEME) or not (folder.exists() or model.startswith((".", "/", "~"))):
            if model.startswith(SCHEME) and model.count("/") < 3:
                yield Offence(model, "", f"{SCHEME}PROVIDER/MODEL", "another form")
            elif not model.startswith(SCHEME) and not HUB_NAME.fullmatch(model):
                yield Offence(model, "", "a folder, org/name of the Hub, or inspect://PROVIDER/MODEL", "none of these")
            return
        if not folder.is_dir():
            yield Offence(model, "", "a folder", "a file" if folder.exists() else "no such folder")
        elif is_adapter(model):
            if aligned is None:
                yield Offence(model, ADAPTER, "the model that the adapter is for", "none", "--aligned MODEL")
            if not (folder / WEIGHTS).is_file():  # PEFT would open a pickle
                yield Offence(model, "", WEIGHTS, "none")
        elif not (folder / "config.json").is_file():
            yield Offence(model, "", f"config.json or {ADAPTER}", "neither")
        elif not any(folder.glob("*.safetensors")):
            yield Offence(model, "", "safetensors files", "none")


class Lazy:
    """An engine that is opened when it is first asked."""

    def __init__(self, opens: Callable[[], Engine], batch: int) -> None:
        self.batch = batch
        self._opens = opens
        self._engine: Engine | None = None

    def answers(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        """Ask the model, opened if need be."""
        if self._engine is None:
            self._engine = self._opens()
        return self._engine.answers(conversations, sampling)

    def close(self) -> None:
        """Close what was opened."""
        if self._engine is not None:
            self._engine.close()


def is_adapter(model: str) -> bool:
    """Whether a local folder holds an adapter."""
    return (Path(model) / ADAPTER).is_file()


def versions(packages: list[str]) -> dict[str, str]:
    """The versions of packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _files(model: str) -> Any:
    """Names, sizes and times of a folder's files, or the manifest's own hash of an output of safeshard."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    try:
        if sealed := json.loads((folder / "manifest.json").read_bytes()).get("blake3"):
            return [sealed, *_stats(folder, "*.safetensors")]
    except (OSError, ValueError, AttributeError):
        pass
    return [*_stats(folder, "*.safetensors"), *_stats(folder, "*.json"), *_stats(folder, "*.jinja")]


def _stats(folder: Path, pattern: str) -> list[tuple[str, int, int]]:
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob(pattern))]
