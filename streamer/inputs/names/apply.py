"""The step for names: other inputs under the aligned checkpoint's names, or refused where that leaves two readings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.names.exchange import Names, Shape, exchange


def in_names_of(aligned: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other` with its tensors under `aligned`'s names; itself where they are called the same.

    Raises:
        RequestError: some of its names may stand for several of `aligned`'s.
    """
    names = exchange(_shapes(other), _shapes(aligned))
    if offences := list(ambiguities(names, other.source.spec, aligned)):
        raise RequestError(offences)
    return other.under(names) if str(names) else other


def ambiguities(names: Names, where: str, aligned: Checkpoint) -> Iterator[Offence]:
    """Offences of names that have several readings, each reading named."""
    for theirs, ours in names.ambiguous.items():
        got = f"{' or '.join(ours)}, which fit equally well" if len(ours) > 1 else f"{ours[0]}, as others do"
        remedy = "rename its tensors as the aligned checkpoint's"
        yield Offence(where, theirs, f"one reading of its names in {aligned.source.spec}", got, remedy)


def _shapes(checkpoint: Checkpoint) -> Mapping[str, Shape]:
    return {name: ref.shape for name, ref in checkpoint.tensors.items()}
