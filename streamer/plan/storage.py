"""What two checkpoints store in other ways: experts fused or apart, quantised or not; compared by module."""

from __future__ import annotations

from collections.abc import Iterator

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.checkpoint import Checkpoint


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


def module_offences(aligned: Checkpoint, other: Checkpoint) -> Iterator[Offence]:
    """Offences of modules that the other checkpoint lacks, or has in another shape, where tensors do not show it."""
    ours, _ = moved(aligned, other)
    remedy = "use checkpoints of one architecture"
    for module, stored in aligned.linears.items():
        if not stored.names & ours:
            continue
        found, wanted = other.weight(module), f"{list(stored.shape)}, as in {aligned.source.spec}"
        if found is None and other.modules.reason(module) is None:
            yield other.offence(module, wanted, "missing", remedy)
        elif found is not None and found.shape != stored.shape:
            yield other.offence(found.name, f"{module}: {wanted}", str(list(found.shape)), remedy)


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
