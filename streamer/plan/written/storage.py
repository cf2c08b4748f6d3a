"""What two checkpoints store in other ways: experts fused or apart, quantised or not; compared by module."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.vocabulary import only_rows_differ


def moved(aligned: Checkpoint, other: Checkpoint) -> tuple[set[str], set[str]]:
    """The tensors of each whose modules the other stores under other names or in another format."""
    ours: set[str] = set()
    theirs: set[str] = set()
    for module, stored in aligned.linears.items():
        found = other.weight(module)
        if found is not None and (found.names != stored.names or found.encoded or stored.encoded):
            ours |= stored.names
            theirs |= found.names
    ours |= aligned.beside_encoded - other.tensors.keys()
    theirs |= other.beside_encoded - aligned.tensors.keys()
    return ours, theirs


def module_offences(
    aligned: Checkpoint, other: Checkpoint, modules: Iterable[str], excused: Container[str], missing: bool
) -> Iterator[Offence]:
    """Offences of modules that a job computes with and the other checkpoint has in another shape, or lacks.

    Where a whole tensor is lacking, that is told only if `missing`: else tensors are compared by name besides.
    """
    ours, _ = moved(aligned, other)
    for module in modules:
        stored, found = aligned.weight(module), other.weight(module)
        if stored is None or any(name in excused for name in stored.names):
            continue
        wanted = f"{list(stored.shape)}, as in {aligned.source.spec}"
        if found is None and other.modules.reason(module) is None and (missing or stored.names & ours):
            remedy = "use the model of one architecture that belongs to the aligned one"
            tensor = stored.name if stored.is_tensor else module
            yield other.offence(tensor, "a weight of the aligned model" if missing else wanted, "missing", remedy)
        elif found is not None and found.shape != stored.shape:
            remedy = "use checkpoints of one architecture"
            if found.is_tensor and only_rows_differ(stored.name, stored.ref, found.ref):
                remedy = (
                    "the job computes with this tensor and the vocabularies differ: resize them to one vocabulary first"
                )
            subject, shapes = f"{module}: {wanted}", (list(stored.shape), list(found.shape))
            if stored.is_tensor and found.is_tensor:
                shapes = (list(stored.ref.shape), list(found.ref.shape))
                subject = f"{shapes[0]}, as in {aligned.source.spec}"
            yield other.offence(found.name, subject, str(shapes[1]), remedy)


def encoded_counterparts(aligned: Checkpoint, rest: Checkpoint) -> dict[str, TensorRef]:
    """The tensors of `rest` that may stand for quantised ones of the aligned model: the whole weight is in one form."""
    found: dict[str, TensorRef] = {}
    for encoding in aligned.modules.encodings.values():
        names = [ref.name for ref in encoding.refs.values()]
        theirs = [rest.tensors.get(name) for name in names]
        if all(t is not None and (t.dtype, t.shape) == (aligned.tensors[t.name].dtype, aligned.tensors[t.name].shape)
               for t in theirs):  # fmt: skip
            found |= {ref.name: ref for ref in theirs if ref is not None}
    return found
