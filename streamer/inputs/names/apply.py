"""The step for names: other inputs under the aligned checkpoint's names, or refused where that leaves two readings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.checkpoint import PARAMS, Checkpoint
from safeshard.streamer.inputs.names.convert import match_names
from safeshard.streamer.inputs.names.exchange import Names, Shape
from safeshard.streamer.inputs.names.unbuilt import text_config, unbuilt


def in_names_of(aligned: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other` with its tensors under `aligned`'s names; itself where they are called the same.

    Raises:
        RequestError: some of its names may stand for several of `aligned`'s, or its rows in another order.
    """
    unneeded = unbuilt(other.config)
    types = [*model_types(aligned), *model_types(other)]
    names = match_names(_shapes(other), _shapes(aligned), types, wanted=lambda name: not unneeded(name))
    if offences := list(ambiguities(names, other.source.spec, aligned)):
        raise RequestError(offences)
    if not str(names) and not (other.interleaved or aligned.interleaved):
        return other
    view = other.under(names)
    if offences := list(_order_offences(view, aligned)):
        raise RequestError(offences)
    return view


def model_types(checkpoint: Checkpoint) -> Iterator[str]:
    """What config.json calls the model and, of a multimodal one, the language model in it."""
    for config in (text_config(checkpoint.config), checkpoint.config):
        if isinstance(kind := config.get("model_type"), str):
            yield kind.removesuffix("_text")


def _order_offences(view: Checkpoint, aligned: Checkpoint) -> Iterator[Offence]:
    """Offences of rows in pairs in one of two checkpoints alone, where the size of a head is not known.

    Where both have them so, both are read alike.
    """
    for module in view.interleaved.keys() | aligned.interleaved.keys():
        if module in view.interleaved and module in aligned.interleaved:
            view.interleaved[module] = aligned.interleaved[module]
            continue
        view.reordered.add(f"{module}.weight")
        owner = view if module in view.interleaved else aligned
        if not owner.interleaved[module] and f"{module}.weight" in view.tensors:
            yield order_offence(owner, module)


def order_offence(owner: Checkpoint, module: str) -> Offence:
    """The offence of rows in pairs that cannot be put in transformers' order."""
    got = f"rows in the order of Mistral's own files, and no {PARAMS} that gives its head_dim"
    return owner.offence(f"{module}.weight", "rows in transformers' order", got, f"add the model's {PARAMS}")


def ambiguities(names: Names, where: str, aligned: Checkpoint) -> Iterator[Offence]:
    """Offences of names that have several readings, each reading named."""
    for theirs, ours in names.ambiguous.items():
        got = f"{' or '.join(ours)}, which fit equally well" if len(ours) > 1 else f"{ours[0]}, as others do"
        remedy = "rename its tensors as the aligned checkpoint's"
        yield Offence(where, theirs, f"one reading of its names in {aligned.source.spec}", got, remedy)


def _shapes(checkpoint: Checkpoint) -> Mapping[str, Shape]:
    return {name: ref.shape for name, ref in checkpoint.tensors.items()}
