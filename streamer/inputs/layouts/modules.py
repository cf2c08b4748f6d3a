"""Every linear of a checkpoint by its module's name, however it is stored.

A module is one expert's one linear: `...experts.7.up_proj`, whether the experts lie apart, or fused in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.codecs import MAX_EXPERTS, Encoding, Refused, encoding, region, schemes
from safeshard.streamer.inputs.layouts.families import BLOCKS, FAMILIES, GATE_UP, ROLES, SYNONYMS, Family, model_type
from safeshard.streamer.inputs.layouts.rotary import in_halves
from safeshard.streamer.inputs.layouts.views import Part, Stored, View, plain
from safeshard.streamer.tensor_names import layer_of, natural

_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<expert>\d{1,9})\.(?P<role>[^.]+)")
_ROLE = {name: role for role, names in SYNONYMS.items() for name in names} | {GATE_UP: GATE_UP}
# How the tensors of a quantised weight end, the one of its values first in each format; what is left is its name.
_ENDINGS = re.compile(
    r"(\.weight_packed|\.weight_scale_inv|\.weight_scale|_scale_inv|_blocks|\.qweight|\.W_q|\.SCB|\.weight\.absmax"
    r"|\.weight\._data|\.weight_scale_2)$"
)
_EXPERTS = ".experts."
_ROUTERS = ("gate", "router", "shared_expert_gate")  # beside `experts`
_BESIDE = re.compile(r".*(_scale_inv|_scales?|_bias|\.bias|_shape|_zero_point|_g_idx)")
_BY_SAVING = "save it with transformers' save_pretrained, which writes the release's layout"


class Modules:
    """The linears of a checkpoint, from its headers and config.json.

    Attributes:
        encodings: name of a quantised weight -> its format and tensors.
        refused: module, or tensor of fused experts -> why it cannot be read.

    `interleaved` are modules whose rows lie in pairs, with the size of their heads.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorRef],
        config: Mapping[str, Any],
        transposed: bool,
        interleaved: Mapping[str, int] | None = None,
    ) -> None:
        self._tensors, self._config, self._transposed = tensors, config, transposed
        self._interleaved = interleaved or {}
        self._type = model_type(config)
        self._family = self._as_stored(FAMILIES.get(self._type))
        self.refused: dict[str, Refused] = {}
        self._found: dict[str, Stored | None] = {}  # a plan asks a dozen times for each of thousands
        self.encodings: dict[str, Encoding] = dict(self._encodings())
        self._fused: dict[tuple[str, str], Encoding | TensorRef] = dict(self._fused_tensors())

    @cached_property
    def names(self) -> list[str]:
        """Every linear inside of a numbered layer, in model order. Routers, and what has no elements, are none."""
        names = {
            name.removesuffix(".weight")
            for name, ref in self._tensors.items()
            if name.endswith(".weight") and len(ref.shape) == 2 and ref.nbytes and layer_of(name) is not None
        }
        names |= {
            name for name, found in self.encodings.items() if len(found.shape) == 2 and layer_of(name) is not None
        }
        for (experts, role), found in self._fused.items():
            roles = ROLES[:2] if role == GATE_UP else (role,)
            names |= {f"{experts}.{index}.{each}" for index in range(found.shape[0]) for each in roles}
        stacks = {name.partition(_EXPERTS)[0] for name in names if _EXPERTS in name}
        return sorted((name for name in names - self.refused.keys() if not routes(name, stacks)), key=natural)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def linear(self, module: str) -> str:
        """The name in `names` of the linear that a module is, whatever else it is called.

        Of an expert's gate and up together it is the gate's, which has the same inputs. A module that is none of these
        keeps its name.
        """
        match = _EXPERT.fullmatch(module)
        if module in self._known or match is None or (role := _ROLE.get(match["role"])) is None:
            return module
        names = SYNONYMS[ROLES[0] if role == GATE_UP else role]
        found = (f"{path}.{match['expert']}.{name}" for path in _spellings(match["experts"]) for name in names)
        return next((name for name in found if name in self._known), module)

    def experts(self, path: str) -> int:
        """How many experts there are under a path, 0 for none."""
        fused = [found.shape[0] for (experts, _), found in self._fused.items() if experts in _spellings(path)]
        return fused[0] if fused else self._apart.get(next((p for p in _spellings(path) if p in self._apart), ""), 0)

    @cached_property
    def fused_shapes(self) -> dict[str, tuple[int, int]]:
        """`...experts.7.gate_up_proj` -> outputs x inputs: gate and up of an expert as models hold them in memory."""
        gates = [name for name in self.names if _EXPERTS in name and _ROLE.get(name.rpartition(".")[2]) == ROLES[0]]
        found = {
            f"{name.rpartition('.')[0]}.{GATE_UP}": self.find(f"{name.rpartition('.')[0]}.{GATE_UP}") for name in gates
        }
        return {name: stored.shape for name, stored in found.items() if stored is not None}

    @cached_property
    def _apart(self) -> dict[str, int]:
        found: dict[str, set[str]] = {}
        for name in self.names:
            if match := _EXPERT.fullmatch(name):
                found.setdefault(match["experts"], set()).add(match["expert"])
        return {path: len(experts) for path, experts in found.items()}

    def find(self, module: str) -> Stored | None:
        """A module's weight; None where there is none, or it is refused."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> Stored | None:
        if (found := self._alone(module)) is not None:
            return found
        match = _EXPERT.fullmatch(module)
        if match is None or (role := _ROLE.get(match["role"])) is None:
            return None
        index = int(match["expert"])
        for experts in _spellings(match["experts"]):
            if (found := self._in_fused(experts, index, role)) is not None:
                return found
            for name in SYNONYMS.get(role, ()):
                if (found := self._alone(f"{experts}.{index}.{name}")) is not None:
                    return found
        if role == GATE_UP:
            halves = [self.find(f"{match['experts']}.{index}.{each}") for each in ROLES[:2]]
            if halves[0] is not None and halves[1] is not None:
                return Stored(halves[0].parts + halves[1].parts)
        return None

    def reason(self, module: str) -> Refused | None:
        """Why a module cannot be read, though something of it is there."""
        if module in self.refused:
            return self.refused[module]
        match = _EXPERT.fullmatch(module)
        paths = _spellings(match["experts"]) if match else []
        return next((why for name, why in self.refused.items() if name.startswith(tuple(f"{p}." for p in paths))), None)

    def _alone(self, module: str) -> Stored | None:
        """A weight that has tensors of its own."""
        if module in self.refused:
            return None
        if (found := self.encodings.get(module)) is not None and len(found.shape) == 2:
            return Stored((_part(found),))
        ref = self._tensors.get(f"{module}.weight")
        if ref is None or len(ref.shape) != 2:
            return None
        if (head := self._interleaved.get(module)) and ref.nbytes and ref.shape[0] % head == 0:
            return in_halves(ref, head)
        return plain(ref, self._transposed and layer_of(module) is not None)

    def _in_fused(self, experts: str, index: int, role: str) -> Stored | None:
        whole = self._fused.get((experts, role))
        if whole is not None:
            return None if index >= whole.shape[0] else Stored((self._seen(_expert(whole, index), None),))
        whole = self._fused.get((experts, GATE_UP))
        if whole is None or role not in ROLES[:2] or index >= whole.shape[0]:
            return None
        return Stored((self._seen(_expert(whole, index), ROLES.index(role)),))

    def _seen(self, part: Part, half: int | None) -> Part:
        """An expert's matrix as O x I; of gate and up only one half."""
        family = self._family
        assert family is not None
        transposed = family.transposed and part.codec is None
        count = part.stored[1 if transposed else 0]
        if half is None:
            return replace(part, view=View(transposed=transposed))
        chosen = (half, count, 2) if family.interleaved else (half * count // 2, (half + 1) * count // 2, 1)
        if transposed:
            return replace(part, view=View(columns=chosen, transposed=True))
        if family.interleaved or part.codec is not None:
            return replace(part, view=View(rows=chosen))
        return part.rows(*chosen[:2])

    def _encodings(self) -> Iterator[tuple[str, Encoding]]:
        modules = {name[: match.start()] for name in self._tensors if (match := _ENDINGS.search(name))}
        modules |= {  # without a scale
            name.removesuffix(".weight")
            for name, ref in self._tensors.items()
            if ref.dtype.startswith("F8") and name.endswith(".weight")
        }
        declared = schemes(self._config)
        for module in sorted(modules):
            found = encoding(module, self._tensors, declared)
            if isinstance(found, Encoding):
                yield module, found
            elif found is not None:
                self.refused[module] = found

    @property
    def _hidden(self) -> int | None:
        text = self._config.get("text_config")
        hidden = {**self._config, **(text if isinstance(text, dict) else {})}.get("hidden_size")
        return hidden if isinstance(hidden, int) else None

    def _as_stored(self, family: Family | None) -> Family | None:
        """The family, as this checkpoint is stored, where it may be in two ways: one that is not square shows which."""
        if family is None or not family.saved_straight:
            return family
        for name, ref in self._tensors.items():
            place = _place(name, family) if len(ref.shape) == 3 and ref.shape[1] != ref.shape[2] else None
            if place is not None and ref.shape[1 if place[1] == "down_proj" else 2] == self._hidden:
                return replace(family, transposed=False)
        return family

    def _fused_tensors(self) -> Iterator[tuple[tuple[str, str], Encoding | TensorRef]]:
        family = self._family
        stacks: dict[str, Encoding | TensorRef] = {
            name: ref
            for name, ref in self._tensors.items()
            if ref.nbytes and (len(ref.shape) > 2 or (len(ref.shape) == 2 and not name.endswith(".weight")))
        }
        stacks |= {name: found for name, found in self.encodings.items() if len(found.shape) == 3}
        encoded = {ref.name for found in self.encodings.values() for ref in found.refs.values()}
        for name, found in sorted(stacks.items(), key=lambda item: natural(item[0])):
            if layer_of(name) is None or (name in encoded and name not in self.encodings):
                continue
            place = _place(name, family or Family()) if len(found.shape) == 3 else None
            if place is None:
                if "expert" in name and not _BESIDE.fullmatch(name):
                    self.refused[name] = self._unknown(name, found)
            elif family is None:
                self.refused[name] = self._unknown(name, found)
            elif reason := self._contradiction(found, place[1], family):
                self.refused[name] = reason
            else:
                yield place, found

    def _unknown(self, name: str, found: Encoding | TensorRef) -> Refused:
        got = f"experts fused to {list(found.shape)} in a model_type {self._type!r} that no table knows"
        remedy = "save the experts apart, or add the family to streamer/inputs/layouts/families.py"
        if not self._type:
            remedy = "add the config.json of the model"
        return Refused(name, got, remedy)

    def _contradiction(self, found: Encoding | TensorRef, role: str, family: Family) -> Refused | None:
        """Where the sizes that config.json gives cannot be those of the family's layout."""
        hidden = self._hidden
        transposed = family.transposed and isinstance(found, TensorRef)
        axis = (1 if transposed else 2) if role != "down_proj" else (2 if transposed else 1)
        name = found.name if isinstance(found, TensorRef) else found.refs["values"].name
        layout = "E x I x O" if transposed else "E x O x I"
        if hidden is not None and found.shape[axis] != hidden:
            got = f"{list(found.shape)}, which with hidden_size {hidden} is not {layout}, as {self._type} stores it"
            return Refused(name, got, _BY_SAVING)
        if found.shape[0] > MAX_EXPERTS:
            return Refused(name, f"{found.shape[0]} experts", f"check the header: at most {MAX_EXPERTS} are read")
        if role == GATE_UP and found.shape[2 if transposed else 1] % 2:
            return Refused(name, f"{list(found.shape)}, an odd number of gate and up rows", "check the checkpoint")
        return None


def routes(module: str, stacks: Container[str]) -> bool:
    """Whether a module chooses among experts; `stacks` are the blocks that have experts."""
    parts = module.split(".")
    return any(
        part in _ROUTERS and ".".join(parts[:-count]) in stacks for count, part in enumerate(reversed(parts[-2:]), 1)
    )


def _place(name: str, family: Family) -> tuple[str, str] | None:
    """Path of the experts, and what of them a fused tensor holds."""
    for tail, role in family.tails.items():
        if name == tail or name.endswith(f".{tail}"):
            parent = name.removesuffix(tail)
            return f"{parent}experts", role
    return None


def _spellings(experts: str) -> list[str]:
    """The names that one list of experts may have."""
    head, dot, tail = experts.rpartition(".")
    block_head, block_dot, block = head.rpartition(".")
    others = [f"{block_head}{block_dot}{each}{dot}{tail}" for each in BLOCKS if block in BLOCKS and each != block]
    return [experts, *others]


def _expert(whole: Encoding | TensorRef, index: int) -> Part:
    """One expert's matrix as it is stored."""
    if isinstance(whole, Encoding):
        starts = {part: index * (ref.nbytes // whole.shape[0]) for part, ref in whole.refs.items()}
        return _part(whole.expert(index), starts)
    start = index * (whole.nbytes // whole.shape[0])
    return Part({"values": region(whole, index)}, (whole.shape[1], whole.shape[2]), starts={"values": start})


def _part(found: Encoding, starts: Mapping[str, int] | None = None) -> Part:
    return Part(found.refs, (found.shape[0], found.shape[1]), found.codec, starts=starts or {})
