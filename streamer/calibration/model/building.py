"""A transformers model from config.json alone: no weights, no code of others, its parameters on the meta device."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from safeshard.manifests.bounded import read_regular
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.calibration.model.experts import COUNTS as EXPERT_COUNTS
from safeshard.streamer.extras import require_transformers
from safeshard.streamer.inputs.codecs import MAX_EXPERTS
from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.sources import MAX_JSON_BYTES

MAX_LAYERS = 10_000

# Attention and experts' kernels may name a Hub repository; the others name code, or weights to fetch.
_CODE_KEYS = re.compile(
    r"_implementation|^auto_map$|^custom_pipelines$|kernel_config|^use_kernels$|_pretrained_backbone$"
)

# The names under which configurations count their layers.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

_QUANTISED = ("quantization_config", "compression_config")  # weights come decoded


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
                raise refuse(folder, expected, str(count), "use the checkpoint that belongs to this config.json")
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "config.json").write_text(json.dumps(_without_code(raw)))
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    except RequestError:
        raise
    except Exception as error:  # a config.json from elsewhere fails in many ways, all of them the file's fault
        got = _brief(error).replace(place, str(folder)) if place else _brief(error)
        raise refuse(folder, "a configuration that transformers reads without remote code", got) from error
    if config.is_encoder_decoder:
        raise refuse(folder, "a decoder-only model", f"{config.model_type}, an encoder-decoder")
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


def build(folder: Path, config: Any, dtype: torch.dtype) -> Any:
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
        raise refuse(folder, "a causal language model that transformers can build", _brief(error)) from error
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
            if part_of(join(path, name)) and child is not None:
                setattr(module, name, None)


def _brief(error: Exception) -> str:
    """What transformers says, without its list of every model that it knows."""
    text = str(error).partition("Model type should be one of")[0].strip()
    return text if len(text) <= 400 else f"{text[:400]}..."


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


def refuse(folder: Path, expected: str, got: str, remedy: str = "calibration takes no such model") -> RequestError:
    return RequestError(Offence(str(folder / "config.json"), expected=expected, got=got, remedy=remedy))


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
