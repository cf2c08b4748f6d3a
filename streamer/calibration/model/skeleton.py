"""A transformers model without weights, whose decoder layers are filled, run and emptied one at a time.

The model is built from config.json with its parameters on the meta device. Its own forward runs once a batch, with the
forward of every decoder layer replaced by a recorder that keeps its arguments (masks, position embeddings) and passes
the hidden state on; the real layers are then called with what was recorded for them. So no architecture needs code of
its own, and a model whose forward does anything else between its layers is noticed and refused.

Of a multimodal model only the language model is built, from the configuration inside of its own: on text it computes
what the whole model does, and the other towers are neither built nor read.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from safeshard.manifests.bounded import read_regular
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.calibration.model.ahead import Load
from safeshard.streamer.calibration.model.experts import COUNTS as EXPERT_COUNTS
from safeshard.streamer.calibration.model.experts import WEIGHTS as FUSED_WEIGHTS
from safeshard.streamer.calibration.model.experts import find_experts
from safeshard.streamer.calibration.model.spelling import renamed, spelling
from safeshard.streamer.extras import require_transformers
from safeshard.streamer.inputs.codecs import MAX_EXPERTS
from safeshard.streamer.inputs.layouts import routes
from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.sources import MAX_JSON_BYTES
from safeshard.streamer.tensor_names import layer_of

MAX_LAYERS = 10_000
# Attention and experts' kernels may name a Hub repository; the others name code, or weights to fetch.
_CODE_KEYS = re.compile(
    r"_implementation|^auto_map$|^custom_pipelines$|kernel_config|^use_kernels$|_pretrained_backbone$"
)
# The names under which configurations count their layers.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_QUANTISED = ("quantization_config", "compression_config")  # weights come decoded


@dataclass(frozen=True)
class LayerCall:
    """What the model's forward gives one decoder layer besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state after `layer`, batch x length x hidden size like `hidden`."""
        output: torch.Tensor | Sequence[torch.Tensor] = layer(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


class _WantsTuple(Exception):
    """The model's forward indexes or unpacks what its layers return, as older transformers releases do."""


class Skeleton:
    """A decoder-only model with its parameters on the meta device, and the checkpoint's names of them.

    Module paths are the checkpoint's own: a tensor's name without `.weight`. A published checkpoint may lack the base
    model's prefix (`transformer.` of GPT-2, `model.` of Llama) or have it once more, or that of a model around it
    (`language_model.model.`); the one spelling that finds every tensor holds for all of them.

    Attributes:
        layers: module path -> decoder layer, in order.
        experts: module path of a decoder layer -> its experts, whose weights are never filled in.
        max_positions: the longest sequence the model takes, in tokens, or None where its configuration does not say.
        width: numbers of a token's hidden state, between layers.
        kept_width: numbers of a token that layers are given besides, or leave to later ones: inputs of their own, keys
            and values.
    """

    def __init__(self, folder: Path, names: Collection[str], dtype: torch.dtype) -> None:
        """Build from `folder`/config.json for a checkpoint with tensors `names` and a forward pass in `dtype`.

        Raises:
            RequestError: transformers is missing or does not know the model; it is not a plain stack of decoder layers,
                or has experts of an unknown kind; the checkpoint lacks tensors other than experts', each of them
                listed, or has biases the configuration switches off.
        """
        config = read_config(folder, len({layer_of(name) for name in names} - {None}))
        model, text = _build(folder, config, dtype), config.get_text_config()
        self._folder = folder
        self._body: nn.Module = model.base_model
        self._body_path = next(path for path, module in model.named_modules() if module is self._body)
        positions = getattr(text, "max_position_embeddings", None)
        self.max_positions: int | None = positions if positions and positions > 0 else None  # of XLNet it is -1
        self.width, self.kept_width = _widths(text)
        layers = _find_layers(folder, self._body, config)
        found = find_experts(folder, config, layers)

        present, base = set(names), _join(self._body_path, "")
        self._fused = {
            f"{base}{layer}.{experts.path}.{name}" for layer, experts in found.items() for name in FUSED_WEIGHTS
        }
        self._needed = {name for name in model.state_dict() if name.startswith(base)} - self._fused
        prefix = model.base_model_prefix + "."
        self._stored_as: dict[str, str] = {}  # a tensor's name once it is renamed as transformers does -> its own
        try:
            self._strip, self._add = spelling(folder, self._needed, present, base, prefix)
        except RequestError as error:
            self._stored_as = {theirs: name for name, theirs in renamed(model, present) if theirs != name}
            if not self._stored_as:
                raise
            again = (present - set(self._stored_as.values())) | self._stored_as.keys()
            try:
                self._strip, self._add = spelling(folder, self._needed, again, base, prefix)
            except RequestError:
                raise error from None
        self._model_paths = {self._spell(base + path): base + path for path in layers}
        self.layers = {self._spell(base + path): layer for path, layer in layers.items()}
        paths = dict(zip(layers, self.layers, strict=True))
        self.experts = {
            paths[layer]: replace(experts, path=_join(paths[layer], experts.path)) for layer, experts in found.items()
        }
        self._refuse_unused_biases(present)

    def linears(self, path: str) -> dict[str, nn.Module]:
        """Module path -> linear (`nn.Linear`, or transformers' `Conv1D`) inside the decoder layer at `path`.

        Routers are none, nor are the linears of experts.
        """
        kinds = (nn.Linear, require_transformers().pytorch_utils.Conv1D)
        stacks = {experts.path.rpartition(".")[0] for experts in self.experts.values()}
        inside = [(_join(path, name), m) for name, m in self.layers[path].named_modules() if isinstance(m, kinds)]
        return {self._own(name): module for name, module in inside if not routes(name, stacks)}

    def shapes(self) -> dict[str, torch.Size]:
        """The checkpoint's tensors of all but the output head, with the shapes that config.json gives them."""
        tensors = self._body.state_dict()
        full = {_join(self._body_path, name): tensor.shape for name, tensor in tensors.items()}
        return {self._spell(name): shape for name, shape in full.items() if name not in self._fused}

    @contextmanager
    def filled(self, path: str | None, load: Load, device: torch.device) -> Iterator[None]:
        """Inside, the decoder layer at `path` has its weights, on `device` and in the dtype of the forward pass.

        Without a path it is everything but the decoder layers: embeddings and final norm. `load` gets the names of the
        checkpoint's tensors, in the order of the modules; each result is dropped on the way out.

        Raises:
            RequestError: a tensor's shape is not the configuration's.
        """
        empty = self._empty(path)
        try:
            for module, name, tensor, full in empty:
                # Buffers that are not saved, such as rotary frequencies, were computed when the model was built.
                value = self._load(full, tensor, load, device) if full in self._needed else tensor.to(device)
                setattr(module, name, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)
            yield
        finally:
            for module, name, tensor, _ in empty:
                setattr(module, name, tensor)

    def stored(self, path: str) -> list[str]:
        """The checkpoint's tensors that `filled` loads for the decoder layer at `path`, in order."""
        return [self._spell(full) for *_, full in self._empty(path) if full in self._needed]

    def _empty(self, path: str | None) -> list[tuple[nn.Module, str, torch.Tensor, str]]:
        """What `filled` fills: module, the tensor's name in it, the tensor, and its name in the model."""
        if path is None:
            inside = {module for layer in self.layers.values() for module in layer.modules()}
            modules = [m for m in self._body.named_modules(prefix=self._body_path) if m[1] not in inside]
        else:
            modules = list(self.layers[path].named_modules(prefix=self._model_paths[path]))
        return [
            (module, name, tensor, _join(where, name))
            for where, module in modules
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if _join(where, name) not in self._fused
        ]

    def record(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Run the model's forward with recorders in place of the decoder layers; needs `filled(None, ...)`.

        Args:
            tokens: batch x length token ids (int64), padded on the right.
            mask: batch x length (int64), 1 for tokens and 0 for padding.

        Returns:
            The first layer's input (batch x length x hidden size, or several of these), and what each layer is called
            with.

        Raises:
            RequestError: the forward does more between its layers than pass the hidden state on.
        """
        for values in (None, 1, 2, 3):
            try:
                return self._record(tokens, mask, values)
            except _WantsTuple:
                continue
            except ValueError as error:
                if "to unpack" not in str(error):
                    raise
        raise _refuse(self._folder, "layers that return a hidden state, and up to two values besides", "others")

    def _record(
        self, tokens: torch.Tensor, mask: torch.Tensor, values: int | None
    ) -> tuple[torch.Tensor, list[LayerCall]]:
        """With layers that return a tensor, or a tuple of so many values."""
        calls: list[LayerCall] = []
        states: list[torch.Tensor] = []

        def recorder(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if states and values is None and hidden.shape == states[0].shape[1:]:
                raise _WantsTuple
            if index != len(calls) or (states and not _same(hidden, states[0])):
                raise _refuse(self._folder, "layers that pass their hidden state on in order", f"not at layer {index}")
            states[:] = [hidden]
            calls.append(LayerCall(args[1:], kwargs))
            return hidden if values is None else (hidden, *[None] * (values - 1))

        layers = list(self.layers.values())
        try:
            for index, layer in enumerate(layers):
                layer.forward = partial(recorder, index)
            self._body(input_ids=tokens, attention_mask=mask, use_cache=False)
        finally:
            for layer in layers:
                del layer.forward
        if states and (states[0].shape[-3:-1] != tokens.shape or states[0].ndim not in (3, 4)):
            expected = "hidden states of batch x length x width, one a layer or several before them"
            raise _refuse(self._folder, expected, f"{_shape(states[0])} for {_shape(tokens)} tokens")
        if len(calls) != len(layers):
            raise _refuse(self._folder, f"{len(layers)} layers that run once each", f"{len(calls)} that ran")
        return states[0], calls

    def _spell(self, name: str) -> str:
        """The checkpoint's name of a tensor, or of a layer."""
        spelled = self._add + name.removeprefix(self._strip)
        return self._stored_as.get(spelled, spelled)

    def _own(self, module: str) -> str:
        """The checkpoint's name of a linear."""
        weight = f"{module}.weight"
        return self._stored_as.get(weight, weight).removesuffix(".weight")

    def _load(self, name: str, like: torch.Tensor, load: Load, device: torch.device) -> torch.Tensor:
        stored = self._spell(name)
        tensor = load(stored)
        if tensor.shape != like.shape:
            remedy = "config.json and the weights do not belong together"
            raise RequestError(Offence(str(self._folder), stored, _shape(like), _shape(tensor), remedy))
        return tensor.to(device, non_blocking=True).to(like.dtype) if device.type == "cuda" else tensor.to(like.dtype)

    def _refuse_unused_biases(self, present: Collection[str]) -> None:
        unused = [
            Offence(str(self._folder), f"{name}.bias", "no such tensor by config.json", "a bias", "correct config.json")
            for path in self.layers
            for name, module in self.linears(path).items()
            if module.bias is None and f"{name}.bias" in present
        ]
        if unused:
            raise RequestError(unused)


def read_config(folder: Path, most_layers: int = MAX_LAYERS) -> Any:
    """The configuration of the decoder-only model in `folder`; RequestError where transformers cannot read one.

    A configuration with more than `most_layers` is refused before transformers makes a list of them. What names code
    to fetch or to run, such as an attention kernel of a Hub repository, transformers never sees.
    """
    transformers, place = require_transformers(), ""
    try:
        raw = json.loads(read_regular(folder / "config.json", MAX_JSON_BYTES))
        for key, count in _counts(raw):
            most, what = (most_layers, "the layers of the checkpoint") if key in _LAYER_COUNTS else (MAX_EXPERTS, "")
            if count > most:
                expected = f"{key} of at most {most}{what and ', '}{what}"
                raise _refuse(folder, expected, str(count), "use the checkpoint that belongs to this config.json")
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "config.json").write_text(json.dumps(_without_code(raw)))
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    except RequestError:
        raise
    except Exception as error:  # a config.json from elsewhere fails in many ways, all of them the file's fault
        got = _brief(error).replace(place, str(folder)) if place else _brief(error)
        raise _refuse(folder, "a configuration that transformers reads without remote code", got) from error
    if config.is_encoder_decoder:
        raise _refuse(folder, "a decoder-only model", f"{config.model_type}, an encoder-decoder")
    return config


def _without_code(config: Any) -> Any:
    """A configuration without what says whose code to run, or how weights are quantised.

    Ours runs as transformers does by itself.
    """
    if isinstance(config, list):
        return [_without_code(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: _without_code(value)
        for key, value in config.items()
        if not _CODE_KEYS.search(key) and key not in _QUANTISED
    }


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    """What a configuration, or one inside of it, says of its numbers of layers and of experts."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in (*_LAYER_COUNTS, *EXPERT_COUNTS) and isinstance(value, int):
            yield key, value
        yield from _counts(value)


def _build(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    transformers = require_transformers()
    dtype_option = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        with _parameters_on_meta(), _StacksOnMeta():
            options = {dtype_option: dtype, "trust_remote_code": False}
            if (text := config.get_text_config()) is not config and _generates(config, text):
                model = transformers.AutoModel.from_config(text, **options)  # its head is of no use
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, **options)
                _drop_towers(model, config)
    except Exception as error:  # as for the configuration
        raise _refuse(folder, "a causal language model that transformers can build", _brief(error)) from error
    return model.eval()


def _generates(config: Any, text: Any) -> bool:
    """Whether what is inside of a model is a language model, which the text tower of CLIP is not."""
    auto = require_transformers().models.auto.modeling_auto
    kinds = {config.model_type, text.model_type}
    tasks = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")  # the last is of newer releases
    known = (getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in tasks)
    return any(not kinds.isdisjoint(names) for names in known)


def _drop_towers(model: nn.Module, config: Any) -> None:
    """Take away what sees and hears, where a model's own configuration is the language model's (Phi-4-multimodal)."""
    if not any(part_of(key) for key in getattr(config, "sub_configs", {})):
        return
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if part_of(_join(path, name)) and child is not None:
                setattr(module, name, None)


def _brief(error: Exception) -> str:
    """What transformers says, without its list of every model that it knows."""
    text = str(error).partition("Model type should be one of")[0].strip()
    return text if len(text) <= 400 else f"{text[:400]}..."


def _widths(text: Any) -> tuple[int, int]:
    """Numbers of a token's hidden state (Gemma 3n has several), and of what layers are given or leave besides."""
    said = text.to_dict()  # where a value may differ from layer to layer, the attribute is refused
    kept = (said.get("hidden_size_per_layer_input") or 0) * text.num_hidden_layers
    if said.get("num_kv_shared_layers"):  # keys and values of one layer of each of two kinds
        size = max(said.get(key) or 0 for key in ("head_dim", "global_head_dim"))
        kept += 4 * max(said.get(key) or 0 for key in ("num_key_value_heads", "num_global_key_value_heads")) * size
    return int(text.hidden_size) * (said.get("altup_num_inputs") or 1), int(kept)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside become meta tensors at once; buffers keep their values.

    `torch.device("meta")` would lose the buffers that are computed at construction and not saved.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # those that are stay themselves: tied weights
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _StacksOnMeta(TorchFunctionMode):
    """Inside, memory with three axes or more, as experts fused to one parameter take, is never allocated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros):
            sizes = args[0] if len(args) == 1 and isinstance(args[0], Sequence) else args
            if len(sizes) > 2:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _find_layers(folder: Path, body: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Path in `body` -> decoder layer: the one outermost ModuleList with as many entries as the model has layers."""
    count = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0 and not path.startswith(tuple(found)):
            found[path + "."] = module
    if len(found) != 1:
        raise _refuse(folder, f"one list of {count} decoder layers", f"{len(found)} in {config.model_type}")
    ((prefix, layers),) = found.items()
    return {f"{prefix}{index}": layer for index, layer in enumerate(layers)}


def _refuse(folder: Path, expected: str, got: str, remedy: str = "calibration takes no such model") -> RequestError:
    return RequestError(Offence(str(folder / "config.json"), expected=expected, got=got, remedy=remedy))


def _same(hidden: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two are one tensor, or one is the other's view of the whole: Gemma 4 cuts out the positions asked for."""
    layouts = ((each.data_ptr(), each.shape, each.stride(), each.dtype) for each in (hidden, other))
    return next(layouts) == next(layouts)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
