"""What a device does for many jobs of a step at once: it forms their sums, and measures what is left of their deltas.

A launch by itself takes longer than most of these small tensors. On a CPU nothing is put off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safeshard.kernels.effect import Pair, Products, products_of_each
from safeshard.kernels.merge import Sum, linear_of_each
from safeshard.streamer.device import Arrivals
from safeshard.streamer.methods.base import Edit

HELD_BYTES = 1 << 28  # of a device's memory that is held until there is enough to do

Use = Callable[[Sequence[float]], None]


class Together:
    """Puts off what is better done for many."""

    def __init__(self, arrivals: Arrivals, device: torch.device) -> None:
        self._arrivals, self._on_device = arrivals, device.type == "cuda"
        self._device = device
        self._edits: list[tuple[Edit, Callable[[Edit], None]]] = []
        self._pairs: list[tuple[Pair, Use]] = []
        self._held_sums = self._held_pairs = 0

    def write(self, edit: Edit, use: Callable[[Edit], None]) -> None:
        """Let `use` have an edit without sums that are still to be formed."""
        sums = _sums(edit)
        if not sums:
            use(edit)
            return
        self._edits.append((edit, use))
        self._held_sums += sum(4 * each.shape.numel() for each in sums.values())
        if self._held_sums > HELD_BYTES:
            self._form()

    def measure(self, left: Pair | Products, use: Use) -> None:
        """Let `use` have the products of a pair that was written, or those of a weight, as numbers."""
        if isinstance(left, Products):
            self._bring([left], [use])
        elif not self._on_device:
            self._bring(products_of_each([left]), [use])
        else:
            self._pairs.append((left, use))
            self._held_pairs += sum(t.numel() * t.element_size() for t in (left.a, left.b, left.new_a, left.new_b))
            if self._held_pairs > HELD_BYTES:
                self._measure()

    def finish(self) -> None:
        """Do what was put off."""
        self._form()
        self._measure()

    def _form(self) -> None:
        due, self._edits, self._held_sums = self._edits, [], 0
        wanted = [(index, name, each) for index, (edit, _) in enumerate(due) for name, each in _sums(edit).items()]
        formed: list[dict[str, Tensor]] = [{} for _ in due]
        for (index, name, _), tensor in zip(wanted, linear_of_each([each for *_, each in wanted]), strict=True):
            formed[index][name] = tensor
        for (edit, use), new in zip(due, formed, strict=True):
            use(replace(edit, tensors={**edit.tensors, **new}))

    def _measure(self) -> None:
        due, self._pairs, self._held_pairs = self._pairs, [], 0
        self._bring(products_of_each([pair for pair, _ in due]), [use for _, use in due])

    def _bring(self, products: Sequence[Products], uses: Sequence[Use]) -> None:
        if not self._on_device:
            for each, use in zip(products, uses, strict=True):
                use([value.item() for value in each])
        elif products:
            together = torch.stack([value for each in products for value in each]).to(self._device)

            def use_all(values: Tensor) -> None:
                for use, row in zip(uses, values.view(-1, 3).tolist(), strict=True):
                    use(row)

            self._arrivals.add(together, torch.float64, use_all)


def _sums(edit: Edit) -> Mapping[str, Sum]:
    return {name: tensor for name, tensor in edit.tensors.items() if isinstance(tensor, Sum)}
