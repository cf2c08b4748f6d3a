"""Which tensors of a checkpoint together are a quantised weight, in which format; what is not read, by name.

Names and dtypes tell; config.json says what they leave open, and must agree where it speaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safeshard.manifests.safetensors_header import TensorRef

if TYPE_CHECKING:
    from safeshard.streamer.inputs.codecs.base import Codec

# Codecs, which bring torch, are imported where a quantised weight is found: names and headers need none.
BYTES = {"F8_E4M3": "fp8", "I8": "int8"}
MAX_EXPERTS = 4096  # several times what any model has: a header could claim millions
_FLOATS = ("F32", "BF16", "F16", "F64")
_ORIGINAL = "use the original checkpoint, or one in bf16 or fp8"
# By the ending of a tensor that only one format has: its name, and what to do.
_REFUSED = {
    ".weight_global_scale": ("NVFP4", _ORIGINAL),
    ".weight_scale_2": ("NVFP4", _ORIGINAL),
    ".qzeros": ("GPTQ or AWQ, with zero points", _ORIGINAL),
    ".qweight": ("GPTQ or AWQ", _ORIGINAL),
    ".weight_zero_point": ("quantised with zero points", _ORIGINAL),
    ".weight_g_idx": ("int4 with reordered columns (actorder)", _ORIGINAL),
    ".weight.absmax": ("bitsandbytes", "save the model without quantising it (load_in_4bit), or use the original"),
    ".weight.quant_map": ("bitsandbytes", "save the model without quantising it (load_in_4bit), or use the original"),
    ".SCB": ("bitsandbytes (int8)", "save the model without quantising it (load_in_8bit), or use the original"),
    ".W_q": ("HQQ", _ORIGINAL),
    ".weight._data": ("quanto", _ORIGINAL),
}
FORMATS = ("fp8 by block, tensor or row", "int8 by row or tensor", "MXFP4", "int4 of compressed-tensors, symmetric")


@dataclass(frozen=True)
class Encoding:
    """A quantised weight: its codec, the tensors of its parts, and its shape, O x I; of fused experts E x O x I."""

    codec: Codec
    refs: Mapping[str, TensorRef]
    shape: tuple[int, ...]

    def expert(self, index: int) -> Encoding:
        """One expert's weight of a fused one: each part's region."""
        return replace(self, refs={part: region(ref, index) for part, ref in self.refs.items()}, shape=self.shape[1:])


@dataclass(frozen=True)
class Refused:
    """A quantised weight that is not read: the tensor that shows it, its format, and what to do."""

    tensor: str
    got: str
    remedy: str


def region(ref: TensorRef, index: int) -> TensorRef:
    """The part of a tensor at `index` of its first dimension, which is contiguous."""
    nbytes = ref.nbytes // ref.shape[0]
    return replace(ref, shape=ref.shape[1:], offset=ref.offset + index * nbytes, nbytes=nbytes)


@dataclass(frozen=True)
class Scheme:
    """What config.json says of quantised weights and names, dtypes and shapes leave open."""

    is_float: bool = False
    bits: int | None = None
    group: int | None = None
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    symmetric: bool = True
    powers: bool = False  # scales are powers of two


def encoding(module: str, tensors: Mapping[str, TensorRef], declared: Sequence[Scheme]) -> Encoding | Refused | None:
    """How a module's weight is quantised; None where it is not.

    `module` is the weight's name without `.weight`; of fused experts the name without `_blocks`, `_scale_inv`.
    `declared` is what `schemes` found in config.json.
    """
    for ending, (name, remedy) in _REFUSED.items():
        if module + ending in tensors:
            return Refused(module + ending, name, remedy)
    if (packed := tensors.get(f"{module}.weight_packed")) is not None:
        return _packed(module, packed, tensors, declared)
    for values, scales in (("_blocks", "_scales"), (".weight_blocks", ".weight_scales")):  # GPT-OSS
        if (blocks := tensors.get(module + values)) is not None and blocks.dtype == "U8" and len(blocks.shape) > 2:
            from safeshard.streamer.inputs.codecs.mxfp4 import GROUP, Mxfp4

            shape = (*blocks.shape[:-2], blocks.shape[-2] * GROUP)
            return _checked(Mxfp4(values, scales), module, tensors, shape, "U8")
    for weight, inverse in ((".weight", ".weight_scale_inv"), ("", "_scale_inv"), (".weight", ".weight_scale")):
        ref = tensors.get(module + weight)
        if ref is not None and ref.dtype.startswith("F8") | (ref.dtype in BYTES):
            if module + inverse in tensors:
                return _bytes(module, ref, weight, inverse, tensors, declared)
            if inverse == ".weight_scale":
                return Refused(ref.name, f"{ref.dtype} without a scale", "check that the checkpoint is whole")
    return None


def _packed(
    module: str, packed: TensorRef, tensors: Mapping[str, TensorRef], declared: Sequence[Scheme]
) -> Encoding | Refused:
    from safeshard.streamer.inputs.codecs.int4 import PER_WORD, PackedInt4
    from safeshard.streamer.inputs.codecs.mxfp4 import Mxfp4

    scales = tensors.get(f"{module}.weight_scale")
    if len(packed.shape) < 2:
        return Refused(
            packed.name, f"packed values of shape {list(packed.shape)}", "check that the checkpoint is whole"
        )
    if packed.dtype == "U8":
        return _checked(Mxfp4(), module, tensors, (*packed.shape[:-1], packed.shape[-1] * 2), "U8")
    integers = [scheme for scheme in declared if not scheme.is_float]
    bits = {scheme.bits for scheme in integers if scheme.bits is not None} or {4}
    if bits != {4}:
        return Refused(packed.name, f"packed integers of {', '.join(map(str, sorted(bits)))} bits", _ORIGINAL)
    if not all(scheme.symmetric for scheme in integers):
        return Refused(packed.name, "int4 with zero points", _ORIGINAL)
    if scales is None or len(scales.shape) != len(packed.shape) or not scales.shape[-1]:
        return Refused(packed.name, "int4 without a scale", "check that the checkpoint is whole")
    columns = packed.shape[-1] * PER_WORD
    group = columns // scales.shape[-1] if scales.shape[-1] > 1 else 0
    sizes = {scheme.group for scheme in integers if scheme.group is not None}
    if group % PER_WORD or (group and sizes and group not in sizes):
        got = f"int4 in groups of {group}, where config.json says {', '.join(map(str, sorted(sizes)))}"
        return Refused(packed.name, got, "make the config and the weights agree")
    return _checked(PackedInt4(group), module, tensors, (*packed.shape[:-1], columns), *_FLOATS)


def _bytes(
    module: str, ref: TensorRef, weight: str, scale: str, tensors: Mapping[str, TensorRef],
    declared: Sequence[Scheme],
) -> Encoding | Refused:  # fmt: skip
    from safeshard.streamer.inputs.codecs.scaled import Fused, Scaled

    if ref.dtype not in BYTES:
        return Refused(ref.name, f"fp8 in {ref.dtype}", _ORIGINAL)
    kind, scales = BYTES[ref.dtype], tensors[module + scale]
    lead = len(ref.shape) - 2
    grid = scales.shape[lead:]
    if lead < 0 or scales.shape[:lead] != ref.shape[:lead]:
        got = f"{list(ref.shape)} with scales {list(scales.shape)}"
        return Refused(ref.name, got, "make the weights and their scales agree")
    powers = scales.dtype == "F8_E8M0" or any(scheme.powers for scheme in declared)
    blocks = {scheme.block for scheme in declared if scheme.block}
    codec = Scaled(f"{kind} by tensor", 0, 0, scale, powers)
    if len(grid) and grid[0] == ref.shape[-2] and grid[1:] in ((), (1,)) and grid[0] > 1:
        codec = Scaled(f"{kind} by row", 1, 0, scale, powers)
    elif grid not in ((), (1,)) and (grid != (1, 1) or blocks):
        if len(blocks) != 1:
            got = f"{kind} in blocks, without weight_block_size in config.json"
            return Refused(ref.name, got, "complete config.json")
        rows, columns = blocks.pop()
        codec = Scaled(f"{kind} in blocks of {rows} x {columns}", rows, columns, scale, powers)
    if weight == "":
        codec = Fused(codec.name, codec.rows, codec.columns, scale, powers)
    return _checked(codec, module, tensors, ref.shape, *_FLOATS, "F8_E8M0")


def _checked(
    codec: Codec, module: str, tensors: Mapping[str, TensorRef], shape: tuple[int, ...], *dtypes: str
) -> Encoding | Refused:
    """The encoding, if its tensors are all there and have the dtypes and shapes of the format."""
    refs: dict[str, TensorRef] = {}
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[0] > MAX_EXPERTS):
        got = f"{codec.name} of shape {list(shape)}"
        return Refused(
            module + codec.names["values"], got, f"a matrix, or one for each of at most {MAX_EXPERTS} experts"
        )
    lead, matrix = shape[:-2], (shape[-2], shape[-1])
    for part, allowed in codec.shapes(matrix).items():
        ref = tensors.get(module + codec.names[part])
        if ref is None:
            return Refused(module + codec.names[part], f"{codec.name} without it", "check that the checkpoint is whole")
        if ref.shape[: len(lead)] != lead or ref.shape[len(lead) :] not in list(allowed):
            wanted = " or ".join(str([*lead, *each]) for each in allowed)
            got = f"{list(ref.shape)}, where {codec.name} has {wanted}"
            return Refused(ref.name, got, "make config.json and the weights agree")
        if part == "scales" and ref.dtype not in dtypes:
            return Refused(ref.name, f"{codec.name} with scales in {ref.dtype}", _ORIGINAL)
        refs[part] = ref
    return Encoding(codec, refs, shape)


def schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """What config.json says of quantised weights; whatever has no meaning is passed over."""
    text = config.get("text_config")
    return [
        scheme
        for each in (config, text if isinstance(text, dict) else {})
        if isinstance(said := each.get("quantization_config") or each.get("compression_config"), dict)
        for scheme in _schemes(said)
    ]


def _schemes(said: Mapping[str, Any]) -> Iterator[Scheme]:
    groups = said.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    for each in weights or [said]:
        if isinstance(each, dict):
            bits, group = (n if type(n := each.get(key)) is int else None for key in ("num_bits", "group_size"))
            yield Scheme(
                each.get("type") == "float", bits, group,
                _block(each.get("block_structure") or each.get("weight_block_size")),
                each.get("symmetric") is not False, each.get("scale_fmt") == "ue8m0",
            )  # fmt: skip


def _block(value: Any) -> tuple[int, int] | None:
    given = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    return (value[0], value[1]) if given else None
