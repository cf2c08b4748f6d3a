"""A checkpoint opened by its headers: which tensors there are, where they lie, what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.codecs import FORMATS, Refused
from safeshard.streamer.inputs.headers import FileHeader, file_header, read_headers
from safeshard.streamer.inputs.layouts import Modules, Stored, plain
from safeshard.streamer.inputs.layouts.rotary import interleaved
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.inputs.names.conversions import OWN_EMBEDDING
from safeshard.streamer.inputs.names.exchange import Names
from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.inputs.names.unbuilt import text_config
from safeshard.streamer.inputs.shards import duplicates, index_offences, indexed_files, unindexed_files, weight_map_of
from safeshard.streamer.sources import Source, read_json
from safeshard.streamer.tensor_names import layer_of, natural

FLOATS = ("BF16", "F16", "F32")
PARAMS = "params.json"  # Mistral's own configuration
NOT_GATHERED = (
    "DeepSpeed ZeRO-3 or FSDP saved it without gathering: save it again with "
    "stage3_gather_16bit_weights_on_model_save, or run DeepSpeed's zero_to_fp32.py"
)
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight")
# That of patches is a linear of pixels.
_EMBEDDINGS = re.compile(r"(.*\.)?(embed_(tokens|in|positions?)[^.]*|(?!patch_)[^.]*_embeddings?|embeddings?|wte|wpe)")


class Checkpoint:
    """Tensors of a checkpoint folder by name, read from headers alone.

    Attributes:
        source: where the files lie.
        config: config.json, or {} where there is none.
        tensors: name -> place, over all shards.
        files: the safetensors files in name order.
        names: how its own names read in `tensors`, where another checkpoint's stand there.
        index_note: what was made of an index that is missing, or not right; "" for all others.
        interleaved: queries and keys whose rows lie in pairs -> the size of their heads, 0 where that is not known.
        reordered: tensors whose rows lie in another order than those of the checkpoint whose names stand here.
    """

    def __init__(
        self, source: Source, config: dict[str, Any], tensors: Mapping[str, TensorRef], files: Sequence[FileHeader]
    ) -> None:
        self.source, self.config, self.tensors, self.files = source, config, dict(tensors), files
        self.names = Names()
        self.index_note = ""
        self.interleaved: dict[str, int] = {}
        self.reordered: set[str] = set()

    def under(self, names: Names) -> Checkpoint:
        """The same checkpoint with its tensors under another's names."""
        tensors = {names.ours(name): replace(ref, name=names.ours(name)) for name, ref in self.tensors.items()}
        view = Checkpoint(self.source, self.config, tensors, self.files)
        view.names = names
        view.index_note = self.index_note
        view.interleaved = {
            names.ours(f"{module}.weight").removesuffix(".weight"): head for module, head in self.interleaved.items()
        }
        return view

    def weight(self, module: str) -> Stored | None:
        """The weight of a module, O x I; an output head that shares the embedding's weight is found there.

        An embedding counts as the linear that it is: its inputs are tokens, so that it is stored in x out.
        """
        found = self.modules.find(module)
        if found is not None and is_embedding(module) and found.is_tensor:
            return plain(found.ref, transposed=True)
        if found is None and self.tied and is_head(f"{module}.weight"):
            return plain(self.embedding) if self.embedding is not None else None
        return found

    @cached_property
    def embedding(self) -> TensorRef | None:
        """The language model's token embedding, vocabulary x hidden size; None where none or several may be it."""
        found = [
            ref
            for name, ref in self.tensors.items()
            if _EMBEDDING.fullmatch(name) and not part_of(name) and layer_of(name) is None
        ]
        return found[0] if len(found) == 1 else None

    @property
    def says_tied(self) -> bool:
        """Whether config.json has the output head share the embedding's weight, as it does where it says nothing."""
        configs = (self.config, text_config(self.config))
        return bool(next((c["tie_word_embeddings"] for c in configs if "tie_word_embeddings" in c), True))

    @cached_property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's weight. A head that is stored has its own."""
        return self.says_tied and not any(map(is_head, self.tensors))

    @cached_property
    def modules(self) -> Modules:
        """Every linear by its module's name, however it is stored."""
        return Modules(self.tensors, self.config, self.stores_transposed, self.interleaved)

    @cached_property
    def linears(self) -> dict[str, Stored]:
        """Weights of the decoder's linear layers, those of experts too, in model order."""
        found = {name: self.modules.find(name) for name in self.modules.names}
        return {name: stored for name, stored in found.items() if stored is not None}

    @cached_property
    def encoded_tensors(self) -> frozenset[str]:
        """The tensors of quantised weights: their values and scales."""
        return frozenset(ref.name for found in self.modules.encodings.values() for ref in found.refs.values())

    @cached_property
    def beside_encoded(self) -> frozenset[str]:
        """What lies beside a quantised weight for its own sake: its shape, scales of activations and caches."""
        modules = self.modules.encodings
        beside = (name for name in self.tensors if name.rpartition(".")[0] in modules and not name.endswith(".bias"))
        caches = (name for name in self.tensors if modules and name.endswith((".k_scale", ".v_scale")))
        return frozenset([*beside, *caches]) - self.encoded_tensors

    @cached_property
    def stores_transposed(self) -> bool:
        """Whether linears are stored in x out, as transformers' Conv1D (GPT-2) does.

        A bias has the length of the output, so each linear that is not square and has a bias tells. Square ones follow.
        """
        votes = [
            bias.shape == ref.shape[1:]
            for name, ref in self.tensors.items()
            if name.endswith(".weight") and len(ref.shape) == 2 and ref.nbytes and layer_of(name) is not None
            if (bias := self.tensors.get(name.removesuffix("weight") + "bias")) and ref.shape[0] != ref.shape[1]
        ]
        return bool(votes) and all(votes)

    def treatable(self, modules: Iterable[str]) -> Iterator[Offence]:
        """Offences of modules that no method can treat: of a format that is not read, or of another dtype."""
        for module in modules:
            found = self.weight(module)
            ref = self.tensors.get(f"{module}.weight")
            if found is None and (why := self.modules.reason(module)) is not None:
                yield self._refused(why)
            elif found is not None and found.dtype not in FLOATS:
                remedy = "save the checkpoint in one of these dtypes first"
                yield self.offence(found.name, "BF16, F16 or F32", found.dtype, remedy)
            elif (found is not None and not found.numel) or (found is None and ref is not None):
                shape = ref.shape if ref is not None else ()
                expected, remedy = "a 2-D weight with elements", "leave the module out of the adapter"
                yield self.offence(f"{module}.weight", expected, str(list(shape)), remedy)

    def untreatable_tensors(self) -> Iterator[Offence]:
        """Offences of tensors that would be left out when every decoder linear is treated."""
        for name in sorted(self.modules.refused, key=natural):
            yield self._refused(self.modules.refused[name])

    def _refused(self, why: Refused) -> Offence:
        expected = f"weights in BF16, F16 or F32, or quantised as {', '.join(FORMATS)}"
        return self.offence(why.tensor, expected, why.got, why.remedy)

    def offence(self, tensor: str, expected: str, got: str, remedy: str) -> Offence:
        """An offence about one of this checkpoint's tensors."""
        ref = self.tensors.get(tensor)
        where = f"{self.source.spec}/{ref.file}" if ref else self.source.spec
        return Offence(where, self.names.theirs(tensor), expected, got, remedy)


def is_embedding(module: str) -> bool:
    """Whether a module, outside of layers, is an embedding: of tokens, or of positions."""
    return layer_of(module) is None and bool(_EMBEDDINGS.fullmatch(module))


def is_head(name: str) -> bool:
    """Whether a tensor is the language model's output head, whatever wraps the model."""
    return name in ("lm_head.weight", "output.weight") or (name.endswith(".lm_head.weight") and not part_of(name))


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a checkpoint by its headers.

    Raises:
        RequestError: no safetensors files, a pickle checkpoint, or an index or header that is wrong; all offenders.
    """
    sizes = source.sizes()
    weight_map = weight_map_of(source) if INDEX in sizes else None
    names = unindexed_files(source, sizes) if weight_map is None else indexed_files(source, sizes, weight_map)
    headers, offences = read_headers(source, names, sizes)
    config = read_json(source, "config.json") if "config.json" in sizes else {}
    if not isinstance(config, dict):
        got = type(config).__name__
        offences.append(Offence(f"{source.spec}/config.json", "", "a JSON object", got, "check the file"))
    index_note = f"the headers of {len(names)} shards stand in for a missing {INDEX}" if len(names) > 1 else ""
    if not offences:
        offences += duplicates(source, headers)
        if weight_map is not None:
            index_note, wrong = index_offences(source, headers, weight_map, config)
            offences += wrong
    if offences:
        raise RequestError(offences)
    tensors = {name: ref for header in headers.values() for name, ref in header.tensors.items()}
    checkpoint = Checkpoint(
        source, config, tensors, [file_header(source, name, header) for name, header in sorted(headers.items())]
    )
    checkpoint.index_note = index_note
    params = read_json(source, PARAMS) if PARAMS in sizes and OWN_EMBEDDING in tensors else {}
    checkpoint.interleaved = interleaved(tensors, config, params if isinstance(params, dict) else {})
    return checkpoint
