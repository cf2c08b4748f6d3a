"""A PEFT LoRA adapter opened by its headers and matched by name to the checkpoint it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.checkpoint import NOT_GATHERED, Checkpoint
from safeshard.streamer.inputs.expert_lora import PackedRef, Packing, is_gate_up, unpack
from safeshard.streamer.inputs.headers import FileHeader, file_header, read_file_header
from safeshard.streamer.inputs.lies_there import ADAPTER, instead_of_adapter
from safeshard.streamer.inputs.lora_config import CONFIG, LoraConfig, read_config
from safeshard.streamer.inputs.matching import (
    LORA_KEY,
    LoraModule,
    Matching,
    module_shapes,
    plain,
    saved_name,
    shapes,
)
from safeshard.streamer.inputs.names.apply import ambiguities, model_types
from safeshard.streamer.inputs.names.convert import match_names
from safeshard.streamer.inputs.names.exchange import Names
from safeshard.streamer.sources import Source, read_json
from safeshard.streamer.tensor_names import layer_of, natural

WEIGHTS = ADAPTER


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a checkpoint.

    Attributes:
        source: where the files lie.
        config: adapter_config.json.
        files: the safetensors file.
        modules: checkpoint module -> its pair, in model order.
        saved: tensors that the adapter carries whole (modules_to_save, resized embeddings), by key in its file.
        places: key -> the checkpoint's tensor that a saved one stands for, where it has one.
        expected: how many modules its config targets.
        targets: those modules.
        names: how its module names (with `.weight`) read in the checkpoint.
    """

    source: Source
    config: LoraConfig
    files: list[FileHeader]
    modules: dict[str, LoraModule]
    saved: dict[str, TensorRef]
    expected: int
    names: Names
    targets: frozenset[str] = frozenset()
    places: Mapping[str, TensorRef] = field(default_factory=dict)

    def own_name(self, module: str) -> str:
        """The name, without wrappers, that PEFT's patterns in the config match a module or a parameter by."""
        if isinstance(a := self.modules[module].a, PackedRef):
            return a.own
        match = LORA_KEY.fullmatch(self.modules[module].a.name)
        assert match is not None
        own = plain(match["path"])
        return f"{own}.weight" if self.config.targets_parameter(f"{own}.weight") else own

    def named_as(self, other: Adapter, base: Checkpoint) -> Adapter:
        """The same, each module called as `other` calls it: of one expert's linear there are several names."""
        names = {base.modules.linear(name): name for name in other.modules if not is_gate_up(name)}
        own = {name: name if is_gate_up(name) else names.get(base.modules.linear(name), name) for name in self.modules}
        return replace(self, modules={own[name]: lora for name, lora in self.modules.items()})


def open_adapter(source: Source, base: Checkpoint, packing: Packing | None = None) -> Adapter:
    """Open an adapter by its header and match it to `base`, the aligned checkpoint.

    `packing` is that of LoRA on fused experts, where its config does not tell.

    Raises:
        RequestError: not a LoRA adapter, an unsupported variant, or one that does not fit `base`; all offenders.
    """
    _require_files(source, source.sizes())
    config = read_config(f"{source.spec}/{CONFIG}", read_json(source, CONFIG))
    header = read_file_header(source, WEIGHTS)
    if (offence := _not_gathered(f"{source.spec}/{WEIGHTS}", header.tensors)) is not None:
        raise RequestError(offence)
    matching = Matching(f"{source.spec}/{WEIGHTS}", config, base)
    pairs, saved = matching.sort(header.tensors)
    pairs, wrong = unpack(pairs, config, packing, matching.where, base)
    matching.offences += wrong
    outside = {saved_name(key): ref.shape for key, ref in saved.items() if layer_of(key) is None}
    names = match_names(shapes(pairs) | outside, module_shapes(base), model_types(base))
    matching.offences += ambiguities(names, matching.where, base)
    modules = matching.match(pairs, names)
    targets = matching.expect(names)
    places = matching.place(saved, names)
    if matching.offences:
        raise RequestError(matching.concluded())
    modules = dict(sorted(modules.items(), key=lambda item: natural(item[0])))
    files = [file_header(source, WEIGHTS, header)]
    return Adapter(
        source, config, files, modules, saved, len(targets | modules.keys()), names, frozenset(targets), places
    )


def _require_files(source: Source, sizes: Mapping[str, int]) -> None:
    offences = []
    if WEIGHTS not in sizes and "adapter_model.bin" not in sizes and (there := instead_of_adapter(source)):
        raise RequestError(Offence(source.spec, "", f"{WEIGHTS} and {CONFIG}", *there))
    if CONFIG not in sizes:
        offences.append(Offence(source.spec, "", CONFIG, "no such file", "name the folder of a PEFT adapter"))
    if "adapter_model.bin" in sizes and WEIGHTS not in sizes:
        remedy = "save the adapter again with a current PEFT; pickles are never opened"
        offences.append(Offence(source.spec, "", WEIGHTS, "adapter_model.bin, a pickle", remedy))
    elif f"{WEIGHTS}.index.json" in sizes:
        remedy = "save the adapter in one file, as PEFT does and reads it"
        offences.append(Offence(source.spec, "", WEIGHTS, "a sharded adapter", remedy))
    elif WEIGHTS not in sizes:
        offences.append(Offence(source.spec, "", WEIGHTS, "no such file", "name the folder of a PEFT adapter"))
    if offences:
        raise RequestError(offences)


def _not_gathered(where: str, tensors: Mapping[str, TensorRef]) -> Offence | None:
    """An offence where the file has not what was trained: its process held only a share of it, or none."""
    if not tensors:
        return Offence(where, "", "lora_A and lora_B tensors", "a file without tensors", NOT_GATHERED)
    empty = sorted((key for key, ref in tensors.items() if ref.shape == (0,)), key=natural)
    if not empty:
        return None
    got = f"shape [0], as {len(empty)} tensors have" if len(empty) > 1 else "shape [0]"
    return Offence(where, empty[0], "a tensor with elements", got, NOT_GATHERED)
