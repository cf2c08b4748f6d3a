"""Files that a job writes: their tensors, in which dtype, and what is said of those that stay out."""

from __future__ import annotations

from collections.abc import Iterable

from safeshard.manifests.safetensors_header import TensorRef, layout
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.checkpoint import FLOATS, Checkpoint, is_head
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import JobPlan, OutputFile
from safeshard.streamer.plan.layout import Layout, layout_of

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Named = tuple[str, str, tuple[int, ...]]  # of an output tensor: name, dtype, shape


def output_layout(plan: JobPlan) -> Layout:
    """How the checkpoint that a job writes is laid out."""
    if plan.layout is None:
        job = plan.job
        plan.layout = layout_of(plan.aligned, job.dequantize, DTYPES[job.dtype or "bfloat16"])
    return plan.layout


def stacked(first: TensorRef, more: TensorRef) -> tuple[int, ...]:
    """The shape of a tensor with the rows of another added."""
    return (first.shape[0] + more.shape[0], *first.shape[1:])


def left_out(name: str, why: str) -> Fallback:
    """What the manifest says of a fine-tuned tensor that is not written."""
    return Fallback(asked="the fine-tuned tensor", done="left out", why=why, subject=name)


def counterpart(checkpoint: Checkpoint, name: str) -> TensorRef | None:
    """The tensor that stands for the aligned model's `name`: of a tied output head, the embedding.

    None where there is none that can be taken over as it is.
    """
    if name in checkpoint.reordered:
        return None
    if is_head(name) and name not in checkpoint.tensors:
        head = checkpoint.weight(name.removesuffix(".weight"))
        return head.ref if head is not None and head.is_tensor else None
    return checkpoint.tensors.get(name)


def dtype_of(job: Job, dtype: str) -> str:
    """The dtype in which a job writes what has `dtype`, by their names in safetensors files."""
    return DTYPES[job.dtype] if job.dtype and dtype in FLOATS else dtype


def output_file(name: str, tensors: Iterable[Named]) -> OutputFile:
    """A safetensors file laid out for tensors of the given names, dtypes and shapes."""
    header, refs = layout(name, list(tensors), {"format": "pt"})
    return OutputFile(name, header, refs)
