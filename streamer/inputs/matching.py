"""Which tensors of an adapter belong to which linear of the checkpoint, by name; what belongs to none is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.checkpoint import FLOATS, Checkpoint, is_embedding, is_head
from safeshard.streamer.inputs.expert_lora import PackedRef, is_expert, oriented, packed_targets
from safeshard.streamer.inputs.layouts import model_type
from safeshard.streamer.inputs.layouts.rotary import PAIRED
from safeshard.streamer.inputs.lora_config import CONFIG, LoraConfig
from safeshard.streamer.inputs.misfit import Pair, another_base, another_rank
from safeshard.streamer.inputs.names.apply import order_offence
from safeshard.streamer.inputs.names.conversions import WRAPPER
from safeshard.streamer.inputs.names.exchange import Names, Shape
from safeshard.streamer.inputs.names.parts import stack_of
from safeshard.streamer.inputs.names.unbuilt import unbuilt
from safeshard.streamer.inputs.vocabulary import only_rows_differ
from safeshard.streamer.tensor_names import layer_of, natural

LORA_KEY = re.compile(
    r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?P<adapter>[^.]+))??(?(embedding)|\.weight)"
)
Sides = Mapping[str, TensorRef]
_SAVED = re.compile(r"\.(?:base_layer|modules_to_save)(?:\.[^.]+)?(?=\.(?:weight|bias)$)")
_WRAPPERS = re.compile(rf"^module\.|(?:^|(?<=\.)){WRAPPER}")
_PEFT_PREFIX = re.compile(rf"^(?:module\.)?(?:{WRAPPER})*base_model\.(?:{WRAPPER})*model\.")


@dataclass(frozen=True)
class LoraModule:
    """One module's pair: delta = scaling * B @ A, A (rank x I) at `a`, B (O x rank) at `b`."""

    a: TensorRef
    b: TensorRef
    rank: int
    scaling: float


class Matching:
    """Matches an adapter's tensors to a checkpoint; every offence goes into `offences`, which `concluded` sums up."""

    def __init__(self, where: str, config: LoraConfig, base: Checkpoint) -> None:
        self.where, self.config, self.base = where, config, base
        self.offences: list[Offence] = []
        self._found: set[str] = set()
        self._packed: set[str] = set()  # of those found, the experts of fused parameters
        self._pairs: dict[str, Pair] = {}  # of the decoder's linears
        self._misshapen: set[Offence] = set()
        self._unplaced: set[Offence] = set()

    def sort(self, tensors: Mapping[str, TensorRef]) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
        """A and B by the adapter's plain module names, and the tensors saved whole by key."""
        pairs: dict[str, dict[str, TensorRef]] = {}
        saved: dict[str, TensorRef] = {}
        for key, ref in sorted(tensors.items(), key=lambda item: natural(item[0])):
            match = LORA_KEY.fullmatch(key)
            if match is None and _is_whole(ref, self.config):
                saved[key] = ref
            elif match is None:
                self._refuse(key, "plain LoRA weights", "an unknown tensor", "retrain as plain LoRA")
            elif pairs.setdefault(plain(match["path"]), {}).setdefault(match["side"], ref) is not ref:
                self._refuse(key, "one adapter in the file", "several", "save them separately")
        if not pairs:
            self._refuse("", "lora_A and lora_B tensors", "none", "name a LoRA adapter")
        return pairs, saved

    def place(self, saved: Mapping[str, TensorRef], names: Names) -> dict[str, TensorRef]:
        """The checkpoint's tensors that saved ones stand for; one of another shape is an offence."""
        places = {}
        for key, ref in saved.items():
            name = names.ours(saved_name(key))
            base = self.base.tensors.get(name)
            if base is None and self.base.tied and is_head(name):
                base = self.base.embedding
            if base is None:
                continue
            places[key] = base
            if ref.dtype not in FLOATS:
                self._refuse(key, "BF16, F16 or F32", ref.dtype, "save the adapter in such a dtype")
            elif ref.shape != base.shape and not only_rows_differ(name, ref, base):
                remedy = "use the adapter's own base model, or save the adapter again"
                self._refuse(key, f"{list(base.shape)}, as {base.name} has", str(list(ref.shape)), remedy)
        return places

    def match(self, pairs: Mapping[str, Sides], names: Names) -> dict[str, LoraModule]:
        """The pairs by the checkpoint's module names, checked."""
        modules = {}
        for path, sides in pairs.items():
            if names.is_ambiguous(f"{path}.weight"):
                continue
            name = names.ours(f"{path}.weight").removesuffix(".weight")
            if self.base.weight(name) is None or name in self._found:
                untreatable = list(self.base.treatable([name]))
                self.offences += untreatable
                if not untreatable:
                    got = f"{name} once more" if name in self._found else "no such weight"
                    remedy = "use the adapter's own base model"
                    self._refuse(path, f"a module of {self.base.source.spec}", got, remedy)
                    self._unplaced.add(self.offences[-1])
                continue
            self._found.add(name)
            if PAIRED.fullmatch(path):
                remedy = "convert the adapter to transformers' names, with its rows of wq and wk in their order"
                self._refuse(path, "an adapter of transformers' model", "one of Mistral's own", remedy)
                continue
            if self.base.interleaved.get(name) == 0:
                self.offences.append(order_offence(self.base, name))
                continue
            if isinstance(sides.get("A"), PackedRef):
                self._packed.add(name)
            if module := self._check(name, path, sides):
                modules[name] = module
        return modules

    def expect(self, names: Names) -> set[str]:
        """The modules that the config targets; those that the file lacks are offences."""
        targets = {*_targets(self.config, self.base, names, self._found), *packed_targets(self._packed, self.base)}
        for name in sorted(targets - self._found, key=natural):
            expected, remedy = "weights for each module that the config targets", "complete the adapter or its config"
            self._refuse(_own_name(names, name), expected, "none", remedy)
            self._unplaced.add(self.offences[-1])
        return targets

    def concluded(self) -> list[Offence]:
        """The offences; where another base or rank explains those of all modules, that in their place."""
        embedding, config = self.base.embedding, self.config
        hidden = embedding.shape[-1] if embedding is not None else None
        if cause := another_base(self.where, self.base.source.spec, hidden, self._pairs):
            explained = self._misshapen | self._unplaced
        elif cause := another_rank(config.where or CONFIG, config.raw["r"], self._pairs):
            explained = self._misshapen
        else:
            return self.offences
        return [cause, *(offence for offence in self.offences if offence not in explained)]

    def _check(self, name: str, path: str, sides: Sides) -> LoraModule | None:
        before = len(self.offences)
        self.offences += self.base.treatable([name])
        if len(self.offences) > before:
            return None
        if len(sides) != 2:
            side = "B" if "A" in sides else "A"
            on_embedding = "lora_embedding_" in next(iter(sides.values())).name
            missing = f"{path}.lora_embedding_{side}" if on_embedding else f"{path}.lora_{side}.weight"
            self._refuse(missing, "both A and B", "one of them", "fetch or save the adapter again")
        meaning = self._meaning(path, next(iter(sides.values())))
        if meaning is None or len(self.offences) > before:
            return None
        weight = self.base.weight(name)
        assert weight is not None
        a, b = oriented(sides["A"], sides["B"], weight.shape, self.config, model_type(self.base.config))
        module = LoraModule(a, b, *meaning)
        self._check_shapes(name, module)
        return module

    def _meaning(self, path: str, ref: TensorRef) -> tuple[int, float] | None:
        """Rank and scaling. A model compiled before PEFT wrapped it had another name then, which anchors may miss."""
        if isinstance(ref, PackedRef):
            return self.config.rank(ref.own), self.config.scaling(ref.own)
        match = LORA_KEY.fullmatch(ref.name)
        assert match is not None
        own, config = _own(match["path"]), self.config
        named = {n for name in (path, own) if (n := config.parameter_or_module(name)) is not None}
        meanings = {(config.rank(name), config.scaling(name)) for name in named}
        if len(meanings) != 1:
            got = "several readings" if meanings else "not a target"
            self._refuse(own, f"one target of {CONFIG}", got, "make the config and the weights agree")
            return None
        return meanings.pop()

    def _check_shapes(self, name: str, module: LoraModule) -> None:
        weight = self.base.weight(name)
        assert weight is not None
        outputs, inputs = weight.shape
        is_end = is_head(f"{name}.weight") or is_embedding(name)
        if not is_end:
            self._pairs[name] = Pair(module.a.shape, module.b.shape, module.rank, weight.shape)
        for ref, shape in ((module.a, (module.rank, inputs)), (module.b, (outputs, module.rank))):
            if ref.dtype not in FLOATS:
                self._refuse(ref.name, "BF16, F16 or F32", ref.dtype, "save the adapter in such a dtype")
            if ref.shape != shape:
                remedy = f"check the rank in {CONFIG}, and that this is the adapter's base model"
                if is_end:
                    remedy = (
                        "its vocabulary was resized: train it with this module among modules_to_save, or merge it first"
                    )
                self._refuse(ref.name, str(list(shape)), str(list(ref.shape)), remedy)
                self._misshapen.add(self.offences[-1])

    def _refuse(self, what: str, expected: str, got: str, remedy: str) -> None:
        self.offences.append(Offence(self.where, what, expected, got, remedy))


def _own(path: str) -> str:
    """The name by which PEFT knew a module: relative to the model it wrapped, which may have had wrappers itself."""
    return _PEFT_PREFIX.sub("", path)


def plain(path: str) -> str:
    return _WRAPPERS.sub("", _own(path))


def saved_name(key: str) -> str:
    """The name in the model that PEFT wrapped of a tensor that it saved whole."""
    return _SAVED.sub("", plain(key))


def of_head(key: str) -> bool:
    """Whether a tensor that an adapter carries whole is an output head."""
    return saved_name(key).endswith("lm_head.weight")


def _is_whole(ref: TensorRef, config: LoraConfig) -> bool:
    """Whether PEFT saved a tensor whole: of modules_to_save, or an embedding whose vocabulary was resized."""
    parts = plain(ref.name).split(".")
    names = tuple(name for name in config.modules_to_save if name)
    if any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts))):
        return True
    is_embedding = len(ref.shape) == 2 and parts[-1] == "weight" and layer_of(ref.name) is None
    return is_embedding and "lora_" not in ref.name


def shapes(pairs: Mapping[str, Sides]) -> dict[str, Shape]:
    """Weight -> outputs x inputs, as the pairs say."""
    none = TensorRef("", "F32", (0, 0), "", 0, 0)
    ends = {path: (sides.get("B", none), sides.get("A", none)) for path, sides in pairs.items()}
    return {f"{path}.weight": (*b.shape[:1], *a.shape[1:2]) for path, (b, a) in ends.items()}


def module_shapes(base: Checkpoint) -> dict[str, Shape]:
    """Weight -> outputs x inputs of the checkpoint's modules, a head that shares the embedding's weight among them.

    What else stands outside of layers is there with its own shape: an adapter may carry it whole.
    """
    shapes: dict[str, Shape] = {f"{module}.weight": stored.shape for module, stored in base.linears.items()}
    shapes |= {f"{module}.weight": shape for module, shape in base.modules.fused_shapes.items()}
    for name, ref in base.tensors.items():
        if name.endswith(".weight") and len(ref.shape) == 2:
            shapes.setdefault(name, ref.shape[::-1] if is_embedding(name.removesuffix(".weight")) else ref.shape)
    for name, ref in base.tensors.items():
        if layer_of(name) is None:
            shapes.setdefault(name, ref.shape)
    if base.tied and base.embedding is not None:
        shapes.setdefault("lm_head.weight", base.embedding.shape)
    return shapes


def _targets(config: LoraConfig, base: Checkpoint, names: Names, found: Iterable[str]) -> Iterator[str]:
    """Checkpoint modules that the config targets: decoder linears of the stacks that the adapter knows, and the head.

    A checkpoint may hold more than the model that was trained: a vision tower, or what transformers never builds.
    """
    stacks = {_stack(name) for name in found}
    kinds = {name.rpartition(".")[2] for name in found}
    experts = {name.rpartition(".")[2] for name in found if is_expert(name)}
    skipped = unbuilt(base.config)
    heads = [name.removesuffix(".weight") for name in (*base.tensors, "lm_head.weight") if is_head(name)]
    head = next((name for name in heads if base.weight(name)), None)
    embeddings = [name for name in found if is_embedding(name)]
    for module in [*base.linears, *([head] if head else []), *embeddings]:
        if layer_of(module) is not None and (_stack(module) not in stacks or skipped(f"{module}.weight")):
            continue
        if is_expert(module) and module.rpartition(".")[2] not in experts:
            continue  # transformers may have fused them, then they are no linears that a name could target
        targeted = config.targets(_own_name(names, module))
        if targeted or (targeted is None and module.rpartition(".")[2] in kinds):
            yield module


def _own_name(names: Names, module: str) -> str:
    return names.theirs(f"{module}.weight").removesuffix(".weight")


def _stack(module: str) -> str:
    """The part of a name before the layer's number."""
    cut = stack_of(module)
    return cut[0] if cut else module
