"""How a written checkpoint is laid out: as the aligned one, or with its quantised weights in floating point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import ITEM_BITS, TensorRef
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.layouts import FAMILIES, Modules, model_type

_QUANTISATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Layout:
    """The tensors of a written checkpoint by name, with their files; and where in them each module's weight goes."""

    tensors: Mapping[str, TensorRef]
    modules: Modules


def layout_of(aligned: Checkpoint, dequantize: bool, dtype: str) -> Layout:
    """The layout of an output; with `dequantize` quantised weights are tensors of `dtype` (such as BF16)."""
    if not dequantize:
        return Layout(aligned.tensors, aligned.modules)
    family = FAMILIES.get(model_type(aligned.config))
    gone = aligned.encoded_tensors | aligned.beside_encoded
    tensors = {name: ref for name, ref in aligned.tensors.items() if name not in gone}
    for module, found in aligned.modules.encodings.items():
        fused, shape = len(found.shape) > 2, found.shape
        if fused and family is not None and family.transposed:
            shape = (shape[0], shape[2], shape[1])
        name = module if fused else f"{module}.weight"
        count = 1
        for size in shape:
            count *= size
        tensors[name] = TensorRef(name, dtype, shape, found.refs["values"].file, 0, count * ITEM_BITS[dtype] // 8)
    return Layout(
        tensors, Modules(tensors, without_quantisation(aligned.config), aligned.stores_transposed, aligned.interleaved)
    )


def left_encoded(aligned: Checkpoint, written: set[str], layout: Layout) -> Iterator[Offence]:
    """Offences of quantised weights that no module writes, so that nothing decodes them."""
    for module, found in aligned.modules.encodings.items():
        names = {module, f"{module}.weight"} & layout.tensors.keys()
        if not names & written:
            got, remedy = "one that this method takes over", "leave --dequantize out, or dequantise the model first"
            yield aligned.offence(found.refs["values"].name, "a quantised weight that is treated", got, remedy)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of quantised weights."""
    kept = {key: value for key, value in config.items() if key not in _QUANTISATION}
    text = kept.get("text_config")
    return kept | {"text_config": without_quantisation(text)} if isinstance(text, dict) else kept


def quantised_as(config: Mapping[str, Any], aligned: Checkpoint, dequantize: bool) -> dict[str, Any]:
    """A configuration that says of quantised weights what the aligned model's does, or nothing with `dequantize`."""
    plain = without_quantisation(config)
    if dequantize or not aligned.encoded_tensors:
        return plain if dequantize else dict(config)
    said = {key: aligned.config[key] for key in _QUANTISATION if key in aligned.config}
    theirs, text = aligned.config.get("text_config"), plain.get("text_config")
    if isinstance(theirs, dict) and isinstance(text, dict):
        inner = {key: theirs[key] for key in _QUANTISATION if key in theirs}
        said |= {"text_config": text | inner} if inner else {}
    return plain | said
