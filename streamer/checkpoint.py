"""A checkpoint opened by its headers: which tensors there are, where they lie, what they mean."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.header import Header, HeaderError, TensorRef, read_header
from safeshard.streamer.sources import Source, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("BF16", "F16", "F32")
# Buffers that old transformers releases saved and new ones do not; they are recomputed and carry no training.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_QUANTISED = re.compile(r".*\.(qweight|qzeros|weight_scale|weight_scale_inv|SCB|absmax|quant_map|weight_packed|scales)")


@dataclass(frozen=True)
class FileHeader:
    """What the manifest says of an input file."""

    name: str
    size: int
    sha256: str  # of the header bytes, length prefix included
    metadata: Mapping[str, str]


class Checkpoint:
    """Tensors of a checkpoint folder by name, read from headers alone.

    Attributes:
        source: where the files lie.
        config: config.json, or {} where there is none.
        tensors: name -> place, over all shards.
        files: the safetensors files in name order.
    """

    def __init__(self, source: Source, config: dict[str, Any], headers: Mapping[str, Header]) -> None:
        self.source, self.config = source, config
        sizes = source.sizes()
        self.tensors: dict[str, TensorRef] = {name: ref for h in headers.values() for name, ref in h.tensors.items()}
        self.files = [
            FileHeader(name, sizes[name], hashlib.sha256(h.raw).hexdigest(), h.metadata)
            for name, h in sorted(headers.items())
        ]

    def weight(self, module: str) -> TensorRef | None:
        """The weight of a module; an output head that shares the embedding's weight is found there."""
        ref = self.tensors.get(module + ".weight")
        if ref is None and self.tied and module.rpartition(".")[2] == "lm_head":
            return next((r for n, r in self.tensors.items() if re.search(r"(embed_tokens|wte)\.weight$", n)), None)
        return ref

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", True)) and "lm_head.weight" not in self.tensors

    @cached_property
    def linears(self) -> dict[str, TensorRef]:
        """Weights of the decoder's linear layers: 2-D `.weight` tensors inside a numbered layer, in model order."""
        refs = {
            name.removesuffix(".weight"): ref
            for name, ref in self.tensors.items()
            if name.endswith(".weight") and len(ref.shape) == 2 and layer_of(name) is not None
        }
        return dict(sorted(refs.items(), key=lambda item: natural(item[0])))

    @cached_property
    def stores_transposed(self) -> bool:
        """Whether linears are stored in x out, as transformers' Conv1D (GPT-2) does.

        A bias has the length of the output, so each linear that is not square and has a bias tells. Square ones follow.
        """
        votes = [
            bias.shape[0] == ref.shape[1]
            for module, ref in self.linears.items()
            if (bias := self.tensors.get(module + ".bias")) and len(bias.shape) == 1 and ref.shape[0] != ref.shape[1]
        ]
        return bool(votes) and all(votes)

    def treatable(self, modules: Iterable[str]) -> Iterator[Offence]:
        """Offences of modules that no method can treat: quantised, fused or of another dtype."""
        if "quantization_config" in self.config:
            method = self.config["quantization_config"]
            got = method.get("quant_method", "quantised") if isinstance(method, dict) else "quantised"
            yield self.offence(
                "config.json: quantization_config", "unquantised weights", str(got), "use the original weights"
            )
        for module in modules:
            ref = self.weight(module)
            if ref is None:
                continue
            if ref.dtype not in FLOATS:
                yield self.offence(
                    ref.name, "BF16, F16 or F32", ref.dtype, "dequantise or convert the checkpoint first"
                )
            elif len(ref.shape) != 2:
                yield self.offence(ref.name, "a 2-D weight", str(list(ref.shape)), "store each expert as a 2-D tensor")

    def untreatable_tensors(self) -> Iterator[Offence]:
        """Offences of tensors that would be left out when every decoder linear is treated."""
        for name, ref in sorted(self.tensors.items(), key=lambda item: natural(item[0])):
            if len(ref.shape) >= 3 and "expert" in name:
                yield self.offence(
                    name, "experts as separate 2-D tensors", f"fused {list(ref.shape)}", "split the experts"
                )
            elif _QUANTISED.fullmatch(name):
                yield self.offence(name, "unquantised weights", "a quantised tensor", "use the original weights")

    def offence(self, tensor: str, expected: str, got: str, remedy: str) -> Offence:
        ref = self.tensors.get(tensor)
        return Offence(f"{self.source.spec}/{ref.file}" if ref else self.source.spec, tensor, expected, got, remedy)


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a checkpoint by its headers.

    Raises:
        RequestError: no safetensors files, a pickle checkpoint, or an index or header that is wrong; all offenders.
    """
    sizes = source.sizes()
    names, weight_map = _shards(source, sizes)
    headers, offences = _read_headers(source, names, sizes)
    if not offences:
        offences += _duplicates(source, headers)
        if weight_map is not None:
            offences += _index_offences(source, headers, weight_map)
    if offences:
        raise RequestError(offences)
    config = read_json(source, "config.json") if "config.json" in sizes else {}
    if not isinstance(config, dict):
        raise RequestError(
            [Offence(f"{source.spec}/config.json", "", "a JSON object", type(config).__name__, "check the file")]
        )
    return Checkpoint(source, config, headers)


def read_file_header(source: Source, name: str) -> Header:
    """Read one file's header.

    Raises:
        RequestError: the header is wrong.
    """
    headers, offences = _read_headers(source, [name], source.sizes())
    if offences:
        raise RequestError(offences)
    return headers[name]


def _shards(source: Source, sizes: Mapping[str, int]) -> tuple[list[str], dict[str, str] | None]:
    if INDEX in sizes:
        index = read_json(source, INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise RequestError(
                [Offence(f"{source.spec}/{INDEX}", "weight_map", "tensor -> file", "malformed", "check the index")]
            )
        return _contained(source, sizes, weight_map), weight_map
    files = [n for n in sizes if n.endswith(".safetensors")]
    if SINGLE in files:
        return [SINGLE], None
    if len(files) == 1:
        return files, None
    pickles = [n for n in sizes if PurePosixPath(n).suffix in _PICKLES]
    if files:
        got, remedy = f"{len(files)} safetensors files without an index", f"add {INDEX}"
    elif pickles:
        got, remedy = (
            f"a pickle checkpoint ({pickles[0]})",
            "convert it to safetensors (save_pretrained does); pickles are never opened",
        )
    else:
        got, remedy = "no safetensors file", "name the folder that holds the checkpoint"
    raise RequestError([Offence(source.spec, "", f"{SINGLE} or {INDEX}", got, remedy)])


def _contained(source: Source, sizes: Mapping[str, int], weight_map: Mapping[str, str]) -> list[str]:
    offences = []
    for file in sorted(set(weight_map.values())):
        if PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
            offences.append(
                Offence(f"{source.spec}/{INDEX}", file, "a file name in the same folder", "a path", "correct the index")
            )
        elif file not in sizes:
            offences.append(
                Offence(
                    f"{source.spec}/{INDEX}", file, "a file in the folder", "no such file", "fetch the missing file"
                )
            )
        elif not file.endswith(".safetensors"):
            offences.append(
                Offence(
                    f"{source.spec}/{INDEX}", file, "safetensors files", "another format", "convert it to safetensors"
                )
            )
    if offences:
        raise RequestError(offences)
    return sorted(set(weight_map.values()))


def _read_headers(
    source: Source, names: Iterable[str], sizes: Mapping[str, int]
) -> tuple[dict[str, Header], list[Offence]]:
    headers, offences = {}, []
    for name in names:
        try:
            headers[name] = read_header(name, sizes[name], partial(source.read, name))
        except HeaderError as error:
            where, expected = f"{source.spec}/{name}", error.expected or "a valid header"
            offences.append(Offence(where, error.tensor, expected, error.problem, "fetch or save the file again"))
    return headers, offences


def _duplicates(source: Source, headers: Mapping[str, Header]) -> Iterator[Offence]:
    seen: dict[str, str] = {}
    for file, header in sorted(headers.items()):
        for name in header.tensors:
            if name in seen:
                yield Offence(
                    f"{source.spec}/{file}", name, "a tensor in one file", f"also in {seen[name]}", "remove one of them"
                )
            seen[name] = file


def _index_offences(source: Source, headers: Mapping[str, Header], weight_map: Mapping[str, str]) -> Iterator[Offence]:
    where = f"{source.spec}/{INDEX}"
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            yield Offence(where, name, f"to be in {file}", "not there", "correct the index or fetch the file again")
    for file, header in headers.items():
        for name in header.tensors.keys() - weight_map.keys():
            yield Offence(f"{source.spec}/{file}", name, "every tensor in the index", "not listed", "correct the index")


def layer_of(name: str) -> int | None:
    """The first number in a dotted name: the layer (`model.layers.3.mlp.up_proj` -> 3), None outside of layers."""
    return next((int(part) for part in name.split(".") if _is_number(part)), None)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key by dotted parts, numbers as numbers: layer 2 before layer 10."""
    return tuple((0, int(p), "") if _is_number(p) else (1, 0, p) for p in name.split("."))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10
