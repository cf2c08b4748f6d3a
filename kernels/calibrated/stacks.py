"""Many small matrices of rows through one operator at once, each with the bits that it has alone.

A product of 16 rows with a large matrix waits for memory; 512 rows run at three to four times the rate. But libraries
of matrices choose the order of summation by the sizes. MKL does not by the number of whole LANES of rows: so each
matrix is padded with zero rows to whole LANES, and whether a stack gives the bits that its last matrix has alone is
found out once for each operator and size. Where it does not, each goes by itself.

Shapes: rows are k x I, each matrix with its own k; an operator maps n x I to n x I and does not mix rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from safeshard.kernels.alignment.stacks import LANES

STACK = 512  # rows at a time: more are hardly faster, and hold more memory
_stackable: dict[Hashable, bool] = {}

Operator = Callable[[torch.Tensor], torch.Tensor]


def stacked(matrices: Sequence[torch.Tensor], apply: Operator, kind: str) -> list[torch.Tensor]:
    """`apply` to each of some matrices of rows.

    Args:
        matrices: k x I, contiguous, of one dtype and device.
        apply: the operator; rows n x I with any n.
        kind: what it is made of. Operators of one kind, width, dtype and device use the same routines.
    """
    padded = [torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % LANES)) for rows in matrices]
    results: list[torch.Tensor] = []
    for group in _groups(padded):
        results += _together(group, apply, (kind, group[0].shape[1], group[0].dtype, str(group[0].device)))
    return [result[: len(rows)] for result, rows in zip(results, matrices, strict=True)]


def _groups(padded: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    group: list[torch.Tensor] = []
    for rows in padded:
        if group and sum(map(len, group)) + len(rows) > STACK:
            yield group
            group = []
        group.append(rows)
    if group:
        yield group


def _together(group: Sequence[torch.Tensor], apply: Operator, key: Hashable) -> Sequence[torch.Tensor]:
    if len(group) > 1 and _stackable.get(key, True):
        results = apply(torch.cat(list(group))).split([len(rows) for rows in group])
        if key in _stackable:
            return results
        _stackable[key] = torch.equal(results[-1], apply(group[-1]))
        if _stackable[key]:
            return results
    return [apply(rows) for rows in group]
