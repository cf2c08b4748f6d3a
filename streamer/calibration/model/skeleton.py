"""A transformers model without weights, whose decoder layers are filled, run and emptied one at a time.

The model is built from config.json with its parameters on the meta device. Its own forward runs once a batch, with the
forward of every decoder layer replaced by a recorder that keeps its arguments (masks, position embeddings) and passes
the hidden state on; the real layers are then called with what was recorded for them. So no architecture needs code of
its own, and a model whose forward does anything else between its layers is noticed and refused.

Of a multimodal model only the language model is built, from the configuration inside of its own: on text it computes
what the whole model does, and the other towers are neither built nor read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.calibration.model.ahead import Load
from safeshard.streamer.calibration.model.building import build, join, read_config, refuse
from safeshard.streamer.calibration.model.experts import WEIGHTS as FUSED_WEIGHTS
from safeshard.streamer.calibration.model.experts import find_experts
from safeshard.streamer.calibration.model.spelling import renamed, spelling
from safeshard.streamer.extras import require_transformers
from safeshard.streamer.inputs.layouts import routes
from safeshard.streamer.tensor_names import layer_of


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
        model, text = build(folder, config, dtype), config.get_text_config()
        self._folder = folder
        self._body: nn.Module = model.base_model
        self._body_path = next(path for path, module in model.named_modules() if module is self._body)
        positions = getattr(text, "max_position_embeddings", None)
        self.max_positions: int | None = positions if positions and positions > 0 else None  # of XLNet it is -1
        self.width, self.kept_width = _widths(text)
        layers = _find_layers(folder, self._body, config)
        found = find_experts(folder, config, layers)

        present, base = set(names), join(self._body_path, "")
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
            paths[layer]: replace(experts, path=join(paths[layer], experts.path)) for layer, experts in found.items()
        }
        self._refuse_unused_biases(present)

    def linears(self, path: str) -> dict[str, nn.Module]:
        """Module path -> linear (`nn.Linear`, or transformers' `Conv1D`) inside the decoder layer at `path`.

        Routers are none, nor are the linears of experts.
        """
        kinds = (nn.Linear, require_transformers().pytorch_utils.Conv1D)
        stacks = {experts.path.rpartition(".")[0] for experts in self.experts.values()}
        inside = [(join(path, name), m) for name, m in self.layers[path].named_modules() if isinstance(m, kinds)]
        return {self._own(name): module for name, module in inside if not routes(name, stacks)}

    def shapes(self) -> dict[str, torch.Size]:
        """The checkpoint's tensors of all but the output head, with the shapes that config.json gives them."""
        tensors = self._body.state_dict()
        full = {join(self._body_path, name): tensor.shape for name, tensor in tensors.items()}
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
            (module, name, tensor, join(where, name))
            for where, module in modules
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if join(where, name) not in self._fused
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
        raise refuse(self._folder, "layers that return a hidden state, and up to two values besides", "others")

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
                raise refuse(self._folder, "layers that pass their hidden state on in order", f"not at layer {index}")
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
            raise refuse(self._folder, expected, f"{_shape(states[0])} for {_shape(tokens)} tokens")
        if len(calls) != len(layers):
            raise refuse(self._folder, f"{len(layers)} layers that run once each", f"{len(calls)} that ran")
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


def _widths(text: Any) -> tuple[int, int]:
    """Numbers of a token's hidden state (Gemma 3n has several), and of what layers are given or leave besides."""
    said = text.to_dict()  # where a value may differ from layer to layer, the attribute is refused
    kept = (said.get("hidden_size_per_layer_input") or 0) * text.num_hidden_layers
    if said.get("num_kv_shared_layers"):  # keys and values of one layer of each of two kinds
        size = max(said.get(key) or 0 for key in ("head_dim", "global_head_dim"))
        kept += 4 * max(said.get(key) or 0 for key in ("num_key_value_heads", "num_global_key_value_heads")) * size
    return int(text.hidden_size) * (said.get("altup_num_inputs") or 1), int(kept)


def _find_layers(folder: Path, body: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Path in `body` -> decoder layer: the one outermost ModuleList with as many entries as the model has layers."""
    count = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0 and not path.startswith(tuple(found)):
            found[path + "."] = module
    if len(found) != 1:
        raise refuse(folder, f"one list of {count} decoder layers", f"{len(found)} in {config.model_type}")
    ((prefix, layers),) = found.items()
    return {f"{prefix}{index}": layer for index, layer in enumerate(layers)}


def _same(hidden: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two are one tensor, or one is the other's view of the whole: Gemma 4 cuts out the positions asked for."""
    layouts = ((each.data_ptr(), each.shape, each.stride(), each.dtype) for each in (hidden, other))
    return next(layouts) == next(layouts)


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
