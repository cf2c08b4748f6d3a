"""A PEFT LoRA adapter opened by its headers and matched by name to the checkpoint it belongs to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.checkpoint import FLOATS, Checkpoint, FileHeader, natural, read_file_header
from safeshard.streamer.header import TensorRef
from safeshard.streamer.lora_config import LoraConfig, read_config
from safeshard.streamer.sources import Source, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|module|base_layer|modules_to_save(?:\.default)?)\."
)
_OTHER_WEIGHTS = re.compile(r".*(lora_|magnitude|trainable_tokens|kasa|vera_|\.ia3_).*")


@dataclass(frozen=True)
class LoraModule:
    """One module's pair: delta = scaling * B @ A, A (rank x I) at `a`, B (O x rank) at `b`."""

    a: TensorRef
    b: TensorRef
    rank: int
    scaling: float


class Adapter:
    """A LoRA adapter of a checkpoint.

    Attributes:
        modules: checkpoint module -> its pair, in model order.
        saved: tensors that the adapter carries whole (modules_to_save, resized embeddings), by key in its file.
        expected: how many modules its config targets.
        renamed: how its module names were matched to the checkpoint's, where they differ, else "".
    """

    def __init__(
        self,
        source: Source,
        config: LoraConfig,
        files: list[FileHeader],
        modules: Mapping[str, LoraModule],
        saved: Mapping[str, TensorRef],
        expected: int,
        renamed: str,
    ) -> None:
        self.source, self.config, self.files = source, config, files
        self.modules = dict(sorted(modules.items(), key=lambda item: natural(item[0])))
        self.saved, self.expected, self.renamed = dict(saved), expected, renamed

    def own_name(self, module: str) -> str:
        """The name that PEFT's patterns in the adapter's config match a module by."""
        match = _LORA_KEY.fullmatch(self.modules[module].a.name)
        assert match is not None
        return _plain(match["path"])


def open_adapter(source: Source, base: Checkpoint) -> Adapter:
    """Open an adapter by its header and match it to `base`, the aligned checkpoint.

    Raises:
        RequestError: not a LoRA adapter, an unsupported variant, or one that does not fit `base`; all offenders.
    """
    sizes = source.sizes()
    _require_files(source, sizes)
    config = read_config(f"{source.spec}/{CONFIG}", read_json(source, CONFIG))
    header = read_file_header(source, WEIGHTS)
    if not isinstance(config, LoraConfig):
        raise RequestError(config + list(_unknown_keys(source, header.tensors)))
    offences = list(_unknown_keys(source, header.tensors))
    pairs, saved, repeated = _pairs(header.tensors)
    for key in repeated:
        offences.append(
            Offence(f"{source.spec}/{WEIGHTS}", key, "one adapter in the file", "several", "save them separately")
        )
    names, renamed = _match(pairs, base)
    modules: dict[str, LoraModule] = {}
    for path, sides in pairs.items():
        name = names.get(path)
        if name is None:
            where = f"{source.spec}/{WEIGHTS}"
            offences.append(
                Offence(
                    where, path, f"a module of {base.source.spec}", "no such weight", "use the adapter's own base model"
                )
            )
            continue
        found = _module(source, base, config, path, name, sides)
        if isinstance(found, LoraModule):
            modules[name] = found
        else:
            offences += found
    expected = _expected(config, base, names)
    for name in sorted(expected - modules.keys() - set(names.values()), key=natural):
        offences.append(
            Offence(
                f"{source.spec}/{WEIGHTS}",
                name,
                "weights for each module that the config targets",
                "none",
                "complete the adapter",
            )
        )
    if not pairs:
        offences.append(
            Offence(f"{source.spec}/{WEIGHTS}", "", "lora_A and lora_B tensors", "none", "name a LoRA adapter")
        )
    if offences:
        raise RequestError(offences)
    files = [FileHeader(WEIGHTS, sizes[WEIGHTS], hashlib.sha256(header.raw).hexdigest(), header.metadata)]
    return Adapter(source, config, files, modules, saved, len(expected | modules.keys()), renamed)


def _require_files(source: Source, sizes: Mapping[str, int]) -> None:
    offences = []
    if CONFIG not in sizes:
        offences.append(Offence(source.spec, "", CONFIG, "no such file", "name the folder of a PEFT adapter"))
    if WEIGHTS not in sizes:
        pickled = "adapter_model.bin" in sizes
        got = "adapter_model.bin, a pickle" if pickled else "no such file"
        remedy = (
            "save the adapter again with a current PEFT; pickles are never opened" if pickled else "name a PEFT adapter"
        )
        offences.append(Offence(source.spec, "", WEIGHTS, got, remedy))
    if offences:
        raise RequestError(offences)


def _unknown_keys(source: Source, tensors: Mapping[str, TensorRef]) -> Iterator[Offence]:
    for key in sorted(tensors):
        if not _LORA_KEY.fullmatch(key) and _OTHER_WEIGHTS.fullmatch(key):
            yield Offence(
                f"{source.spec}/{WEIGHTS}", key, "plain LoRA weights", "another kind", "retrain as plain LoRA"
            )


def _pairs(
    tensors: Mapping[str, TensorRef],
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef], list[str]]:
    """Sort tensors into A and B by module path, tensors saved whole, and keys that repeat a side of a module."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    saved, repeated = {}, []
    for key, ref in sorted(tensors.items()):
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            saved[key] = ref
        elif match["side"] in pairs.setdefault(match["path"], {}):
            repeated.append(key)
        else:
            pairs[match["path"]][match["side"]] = ref
    return pairs, saved, repeated


def _module(
    source: Source, base: Checkpoint, config: LoraConfig, path: str, name: str, sides: Mapping[str, TensorRef]
) -> LoraModule | list[Offence]:
    where = f"{source.spec}/{WEIGHTS}"
    if len(sides) != 2:
        missing = "lora_B" if "A" in sides else "lora_A"
        return [
            Offence(where, f"{path}.{missing}.weight", "both A and B", "one of them", "fetch or save the adapter again")
        ]
    a, b, weight = sides["A"], sides["B"], base.weight(name)
    assert weight is not None
    target = _plain(path)
    rank = config.rank(target)
    shape = weight.shape[::-1] if base.stores_transposed and weight.name.startswith(name) else weight.shape
    offences = [
        Offence(where, ref.name, "BF16, F16 or F32", ref.dtype, "save the adapter in a float dtype")
        for ref in (a, b)
        if ref.dtype not in FLOATS
    ]
    for ref, expected in ((a, (rank, shape[1])), (b, (shape[0], rank))):
        if len(weight.shape) == 2 and ref.shape != expected:
            remedy = f"check the rank in {CONFIG}, and that this is the adapter's base model"
            offences.append(Offence(where, ref.name, str(list(expected)), str(list(ref.shape)), remedy))
    if config.targets(target) is False:
        offences.append(
            Offence(where, path, f"a target of {CONFIG}", "not a target", "make the config and the weights agree")
        )
    return offences or LoraModule(a, b, rank, config.scaling(target))


def _plain(path: str) -> str:
    """The name PEFT matches its patterns with: without its own prefix and without wrappers."""
    return _WRAPPERS.sub("", path.removeprefix("base_model.model."))


def _match(pairs: Mapping[str, object], base: Checkpoint) -> tuple[dict[str, str], str]:
    """Match adapter paths to checkpoint modules: as they are, or all of them with one prefix exchanged for another."""
    plain = {path: _plain(path) for path in pairs}
    exact = {path: name for path, name in plain.items() if base.weight(name) is not None}
    if len(exact) == len(plain) or not plain:
        return exact, ""
    probe = min((name for path, name in plain.items() if path not in exact), key=natural)
    known = [n.removesuffix(".weight") for n in base.tensors if n.endswith(".weight")]
    parts = probe.split(".")
    for cut in range(len(parts)):
        tail = ".".join(parts[cut:])
        heads = {n[: len(n) - len(tail)] for n in known if n == tail or n.endswith("." + tail)}
        if len(heads) == 1:
            old, new = probe[: len(probe) - len(tail)], heads.pop()
            moved = {path: new + name.removeprefix(old) for path, name in plain.items() if name.startswith(old)}
            if len(moved) == len(plain) and all(base.weight(name) is not None for name in moved.values()):
                return moved, f"module prefix {old!r} read as {new!r}"
        if heads:
            break
    return exact, ""


def _expected(config: LoraConfig, base: Checkpoint, names: Mapping[str, str]) -> set[str]:
    """Checkpoint modules that the config targets, under the adapter's own naming."""
    prefixes = {(_plain(path), name) for path, name in names.items()}
    first, name = next(iter(sorted(prefixes)), ("", ""))
    common = 0
    while common < min(len(first), len(name)) and first[-1 - common] == name[-1 - common]:
        common += 1
    old, new = first[: len(first) - common], name[: len(name) - common]
    leaves = {n.rpartition(".")[2] for n in names.values()}
    expected = set()
    for module, ref in base.linears.items():
        if len(ref.shape) != 2 or not module.startswith(new):
            continue
        targeted = config.targets(old + module.removeprefix(new))
        if targeted or (targeted is None and module.rpartition(".")[2] in leaves):
            expected.add(module)
    return expected
