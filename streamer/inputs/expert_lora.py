"""LoRA on fused experts, as PEFT's `target_parameters` and Unsloth store it: one pair of tensors for all experts.

With E experts of rank r, A is E r x in and B is out x E r. Expert e's A are the rows from e r on. Its B are, as PEFT
packs them, the columns e, e + E, e + 2 E, ... (`B.reshape(out, r, E)[:, :, e]`), and as Unsloth did before September
2026 (unsloth#6930, unsloth-zoo#1269) the columns from e r on. The shapes are the same, so the config has to tell.

PEFT before 0.19 took a parameter of E x out x in for E x in x out (unsloth-zoo#647), and still does where a model's is
the other way round than it thinks: then A acts on outputs and B on inputs, and the pair is read the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import ITEM_BITS, TensorRef
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.codecs import MAX_EXPERTS
from safeshard.streamer.inputs.layouts import FAMILIES, GATE_UP, WHOLE, Part, Stored, View, plain
from safeshard.streamer.inputs.lora_config import LoraConfig
from safeshard.streamer.tensor_names import layer_of

Packing = Literal["peft", "unsloth"]
# Parameters of experts in the order that models define them, in which PEFT nests its wrappers, the first innermost.
_PARAMETERS = (GATE_UP, "gate_proj", "up_proj", "down_proj")
_LAYOUTS: dict[str, Packing] = {"rank_major": "peft", "grouped_by_expert": "unsloth"}  # Unsloth's marker
_EXPERT = re.compile(r"\.experts\.\d+\.")
_SWAPS = (0, 19)  # the release of PEFT from which on a parameter is taken for E x out x in


@dataclass(frozen=True)
class PackedRef(TensorRef):
    """One expert's A or B inside of a tensor for all experts; name, dtype and shape as of a tensor of its own.

    `tensor` holds all experts', `whole` is what is read of it, `view` what is seen of that; `own` is the parameter's
    name in the model that PEFT wrapped. `rows` tells lora_A from lora_B, and `grouped` Unsloth's packing of the latter.
    """

    tensor: TensorRef = field(default=None)  # type: ignore[assignment]
    whole: TensorRef = field(default=None)  # type: ignore[assignment]
    view: View = WHOLE
    own: str = ""
    expert: int = 0
    count: int = 1
    rows: bool = False
    grouped: bool = False

    def flipped(self) -> PackedRef:
        """The same, transposed."""
        view = replace(self.view, transposed=not self.view.transposed)
        return replace(self, shape=self.shape[::-1], view=view)


def read_ref(ref: TensorRef) -> TensorRef:
    """What is read for a side of a pair."""
    return ref.whole if isinstance(ref, PackedRef) else ref


def view_of(ref: TensorRef) -> View:
    """What is seen of what is read."""
    return ref.view if isinstance(ref, PackedRef) else View()


def whole_ref(ref: TensorRef) -> TensorRef:
    """The tensor that a side of a pair lies in."""
    return ref.tensor if isinstance(ref, PackedRef) else ref


def output(ref: TensorRef, what: str, rank: int) -> Stored:
    """Where a side of a pair ("a" or "b") goes in an output tensor, once it is of some rank."""
    shape = full_shape(ref, what, rank)
    nbytes = shape[0] * shape[1] * ITEM_BITS[ref.dtype] // 8
    full = TensorRef(ref.name, ref.dtype, shape, "", 0, nbytes)
    if not isinstance(ref, PackedRef):
        return plain(full)
    whole = Part({"values": full}, shape, starts={"values": 0})
    if ref.rows:
        part = whole.rows(ref.expert * rank, (ref.expert + 1) * rank)
        return Stored((replace(part, view=View(transposed=ref.view.transposed)),))
    columns = _columns(ref.expert, ref.count, rank, ref.grouped)
    return Stored((replace(whole, view=View(columns=columns, transposed=ref.view.transposed)),))


def full_shape(ref: TensorRef, what: str, rank: int) -> tuple[int, int]:
    """The shape of the output tensor that a side of a pair of some rank lies in."""
    if isinstance(ref, PackedRef):
        return (ref.count * rank, ref.whole.shape[1]) if ref.rows else (ref.whole.shape[0], ref.count * rank)
    return (rank, ref.shape[1]) if what == "a" else (ref.shape[0], rank)


def is_expert(module: str) -> bool:
    """Whether a module is one expert's."""
    return _EXPERT.search(module) is not None


def is_gate_up(module: str) -> bool:
    """Whether a module is an expert's gate and up together."""
    return is_expert(module) and module.endswith(f".{GATE_UP}")


def packed_targets(modules: Iterable[str], base: Checkpoint) -> Iterator[str]:
    """The modules that a config targets, given those found of fused parameters: those of all layers and experts."""
    layers = {layer_of(name) for name in base.linears if is_expert(name)}
    built = base.config.get("num_hidden_layers")
    forms = set()  # path before and after the layer's number, and what follows the expert's
    for module in modules:
        experts, _, rest = module.partition(".experts.")
        head, _, tail = re.split(r"(?:^|(?<=\.))(\d+)(?=\.|$)", experts, maxsplit=1)
        forms.add((head, tail, rest.partition(".")[2]))
    for head, tail, role in sorted(forms):
        for layer in sorted(n for n in layers if n is not None and not (isinstance(built, int) and n >= built)):
            path = f"{head}{layer}{tail}.experts"
            for expert in range(base.modules.experts(path)):
                yield f"{path}.{expert}.{role}"


def unpack(
    pairs: Mapping[str, dict[str, TensorRef]], config: LoraConfig, packing: Packing | None, where: str, base: Checkpoint
) -> tuple[dict[str, dict[str, TensorRef]], list[Offence]]:
    """The pairs, those of fused parameters expert by expert under the names of modules; and what is wrong with them.

    A target that is a parameter of experts, or a weight of `base`, has pairs; PEFT passes over others, as it does over
    the routers that it targets of its own accord where a family calls them otherwise.
    """
    if not config.target_parameters:
        return dict(pairs), []
    found: dict[str, dict[str, TensorRef]] = {}
    offences: list[Offence] = []
    depths: dict[str, int] = {}
    taken: set[str] = set()
    for path in pairs:
        plain_path, depth = _unnested(path)
        depths[plain_path] = max(depths.get(plain_path, 0), depth)
    for path, sides in pairs.items():
        module, depth = _unnested(path)
        # A bare name, as PEFT writes it of modules that transformers has fused, ends all names that are made with it.
        holds = module.rpartition(".")[2] == "experts"
        named = [name for name in _PARAMETERS if holds and config.targets_parameter(f"{module}.{name}")]
        if not named:
            found[path] = sides  # of a weight that is targeted as a parameter, such as a router's, a plain LoRA
            taken.add(f"{module}.weight")
            continue
        if len(named) != depths[module] + 1:
            got = f"{depths[module] + 1} pairs for {', '.join(named)}"
            offences.append(
                Offence(where, module, "a pair for each of target_parameters", got, "save the adapter again")
            )
            continue
        own = f"{module}.{named[depths[module] - depth]}"
        taken.add(own)
        rank = config.rank(own)
        count = sides["A"].shape[0] // rank if "A" in sides and len(sides["A"].shape) == 2 else 0
        wrong = list(_shape_offences(sides, rank, count, where, own))
        offences += wrong
        if wrong:
            continue
        how = packing or _told(config) if count > 1 and rank > 1 else "peft"
        if how is None:
            expected = "--expert-packing peft or unsloth: the same shapes mean two things"
            got = "experts' LoRA that names no packing"
            remedy = (
                "peft for adapters of PEFT, or of Unsloth from September 2026 on; unsloth for older ones of Unsloth"
            )
            offences.append(Offence(where, own, expected, got, remedy))
            continue
        for expert in range(count):
            found[f"{module}.{expert}.{own.rpartition('.')[2]}"] = {
                "A": _rows(sides["A"], own, expert, count, rank),
                "B": _of_columns(sides["B"], own, expert, count, rank, how == "unsloth"),
            }
    if not offences:
        offences += _untaken(config, taken, where, base)
    return found, offences


def _untaken(config: LoraConfig, taken: set[str], where: str, base: Checkpoint) -> Iterator[Offence]:
    """Offences of targets that no pair is of; not of weights that the model lacks, which PEFT passed over too."""
    for target in config.target_parameters:
        passed_over = target.rpartition(".")[2] == "weight" and not _names(target, base.tensors)
        if not passed_over and not _names(target, taken):
            expected = "weights among target_parameters, of experts or of linears, and a pair for each"
            remedy = "complete the adapter, or merge it into a full checkpoint and use --finetuned"
            yield Offence(config.where or where, "target_parameters", expected, f"none for {target!r}", remedy)


def oriented(
    a: TensorRef, b: TensorRef, shape: tuple[int, int], config: LoraConfig, model: str
) -> tuple[TensorRef, TensorRef]:
    """A (r x in) and B (out x r) of a module of `shape`, read the other way round where they were trained so.

    Where only one reading fits it is taken; of a square weight PEFT's version and the family tell.
    """
    if not isinstance(a, PackedRef) or not isinstance(b, PackedRef):
        return a, b
    straight = (b.shape[0], a.shape[1]) == shape
    turned = (a.shape[1], b.shape[0]) == shape
    family = FAMILIES.get(model)
    in_by_out = family is not None and family.memory_transposed
    swaps = _version(config) >= _SWAPS and not (family is not None and family.says_transposed)
    if turned and (not straight or in_by_out == swaps):
        return b.flipped(), a.flipped()
    return a, b


def _names(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _unnested(path: str) -> tuple[str, int]:
    """A module's path without PEFT's nesting, and how deep it was nested."""
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return path, depth


def _shape_offences(sides: Mapping[str, TensorRef], rank: int, count: int, where: str, own: str) -> Iterator[Offence]:
    shapes = {side: list(ref.shape) for side, ref in sides.items()}
    fits = len(sides) == 2 and all(len(ref.shape) == 2 for ref in sides.values())
    if (
        not fits
        or not 0 < count <= MAX_EXPERTS
        or sides["A"].shape[0] != count * rank
        or sides["B"].shape[1] != count * rank
    ):
        expected = f"A of experts * {rank} rows and B of as many columns"
        yield Offence(where, own, expected, str(shapes), "check the rank in adapter_config.json")


def _told(config: LoraConfig) -> Packing | None:
    """The packing that the config tells: by Unsloth's marker, else PEFT's unless Unsloth may have written it."""
    if marker := config.raw.get("lora_B_layout"):
        return _LAYOUTS.get(marker)
    mapping = config.raw.get("auto_mapping")
    base = str(config.raw.get("base_model_name_or_path")).lower()
    if base.startswith("unsloth/") or any("unsloth" in key for key in (mapping if isinstance(mapping, dict) else ())):
        return None
    return "peft" if config.raw.get("peft_version") else None


def _version(config: LoraConfig) -> tuple[int, ...]:
    """PEFT's release, (0, 0) where the config has none: it has one since 0.18."""
    numbers = re.findall(r"\d+", str(config.raw.get("peft_version") or "0.0"))
    return tuple(int(number[:6]) for number in numbers[:2])


def _rows(ref: TensorRef, own: str, expert: int, count: int, rank: int) -> PackedRef:
    width = ref.nbytes // ref.shape[0]
    shape = (rank, ref.shape[1])
    region = replace(ref, shape=shape, offset=ref.offset + expert * rank * width, nbytes=rank * width)
    return PackedRef(
        ref.name, ref.dtype, shape, ref.file, region.offset, region.nbytes, ref, region, own=own, expert=expert,
        count=count, rows=True,
    )  # fmt: skip


def _of_columns(ref: TensorRef, own: str, expert: int, count: int, rank: int, grouped: bool) -> PackedRef:
    view = View(columns=_columns(expert, count, rank, grouped))
    return PackedRef(
        ref.name, ref.dtype, (ref.shape[0], rank), ref.file, ref.offset, ref.nbytes // count, ref, ref, view, own,
        expert, count, grouped=grouped,
    )  # fmt: skip


def _columns(expert: int, count: int, rank: int, grouped: bool) -> tuple[int, int, int]:
    return (expert * rank, (expert + 1) * rank, 1) if grouped else (expert, count * rank, count)
