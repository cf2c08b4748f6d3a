"""The public functions: the commands, callable. Made by tests/stubs.py from the options; do not edit."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

from safeshard.manifests.verify import Finding
from safeshard.streamer.run.factors.save_factors import Factors
from safeshard.streamer.run.result import Result

def batch(
    jobs: str | PathLike[str],
    *,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
    keep_going: bool = False,
    skip_finished: bool = False,
    note: Callable[[str], None] = ...,
    part: str | None = None,
    engine: Literal["local", "ray"] = "local",
    parts: int | None = None,
) -> list[Result]:
    """Run the jobs of a YAML file in one pass.

    A checkpoint that jobs share is read once.

    Args:
        jobs: the file; its form is described in `safeshard.streamer.plan.request.jobs_file`.
        keep_going: run what can run although some jobs cannot; `SomeFailedError` then names those, and has the results.
        skip_finished: leave out jobs whose output is finished, whatever it was made of. Without it a finished output is
            passed by only where this very request wrote it, and refused otherwise.
        note: receives how many jobs were left out.
        part: "i/n": do the i-th of n parts of the work, for `finish` to put together; manifests are None.
        engine: "ray" does all parts as tasks of a Ray cluster, and finishes.
        parts: with engine "ray", how many. Default: one a GPU, without GPUs one a node.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def calibrate(
    *,
    aligned: str | PathLike[str],
    output: str | PathLike[str],
    task_data: str | PathLike[str] | None = None,
    keep_data: str | PathLike[str] | None = None,
    recipe: Literal["published"] | None = None,
    calibration: str | PathLike[str] | None = None,
    samples: int = 128,
    max_tokens: int = 512,
    seed: int = 0,
    percdamp: float = 0.01,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    save: Literal["both", "factors", "grams"] = "both",
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Factors:
    """Save Grams and factors for many jobs.

    Returns their folder, and the modules of the aligned model that have no factor.
    Keywords are the fields of `safeshard.streamer.methods.calibrate.Calibrate` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        output: folder to write; must not exist.
        task_data: prompts of the task, .jsonl; answers are not needed.
        keep_data: with --task-data: other prompts whose answers must stay as they are.
        recipe: published: what is not given is as in the authors' scripts (docs/differences.md).
        calibration: prompts with safe answers: a file, hf://datasets/org/name/file, a URL (default: the built-in).
        samples: prompts to take, by a seeded permutation; fewer only where this is not given.
        max_tokens: longest prompt with answer, in tokens; the rest is cut.
        seed: of the choice of samples.
        percdamp: damping of the Gram matrices, as a fraction of the mean diagonal.
        dtype: dtype of the forward pass (default: the aligned checkpoint's).
        save: factors are what Safe Delta reads, Grams what ridge reads; Grams take half the space.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def finish(
    jobs: str | PathLike[str],
    *,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> list[Result]:
    """Put the parts of a batch together.

    The outputs are those that `batch` writes in one pass. What the numbers of all parts decide is done first.

    Args:
        jobs: the file that the parts were given.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def inspect(
    output: str | PathLike[str],
    *,
    width: int | None = None,
    color: bool = False,
    plot: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> str:
    """Show the decisions of a finished output.

    A table of layers and modules, and a summary.

    Args:
        width: columns, from which on tables go on below. Default: the terminal's.
        color: paint the decisions by ANSI codes.
        plot: a .svg, .png or .pdf file for a picture of the values by layer.
        overwrite: replace an existing picture.
    """

def lssf(
    *,
    aligned: str | PathLike[str],
    unaligned: str | PathLike[str],
    serve: Literal["vllm"] | None = None,
    rank: int | None = None,
    output_format: Literal["adapter", "checkpoint"] | None = None,
    recipe: Literal["published"] | None = None,
    calibration: str | PathLike[str] | None = None,
    samples: int = 128,
    max_tokens: int = 512,
    seed: int = 0,
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    factors: str | PathLike[str] | None = None,
    alpha: float = 1.0,
    entropy: float = 0.8,
    safety_rank: int | None = None,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """LSSF: add part of the safety vector, a baseline.

    Of what alignment once added, what lies in the directions that answer safe inputs is added (arXiv 2602.00038).
    Keywords are the fields of `safeshard.streamer.methods.lssf.Lssf` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        unaligned: a model without the alignment of `aligned`: its base, or one that lost it.
        serve: write the adapter so that this reads it right: scaling 1, one rank that it takes.
        rank: with --serve: truncate to this rank (default: exact).
        output_format: of an adapter's output: adapter, or checkpoint to merge it (default: adapter).
        recipe: published: what is not given is as in the authors' scripts (docs/differences.md).
        calibration: prompts with safe answers: a file, hf://datasets/org/name/file, a URL (default: the built-in).
        samples: prompts to take, by a seeded permutation; fewer only where this is not given.
        max_tokens: longest prompt with answer, in tokens; the rest is cut.
        seed: of the choice of samples.
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        factors: folder that `calibrate` wrote, in place of --calibration.
        alpha: weight of what is added; 0 gives the fine-tuned model.
        entropy: share of the entropy of a module's energies on safe inputs that U holds.
        safety_rank: of an adapter's output: most directions appended to a module (default: 64).
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def report(
    output: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    evaluation: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    file: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page about finished outputs.

    One HTML file that needs nothing else; about several outputs it begins with a comparison. Returns where it is.

    Args:
        output: a finished output, or several; or a folder of them, as a batch leaves it.
        evaluation: an evaluation.json, or the folder that `evaluate` wrote, or several, with figures of the outputs.
        file: the .html file (the command's `--output`). Default: `OUT.report.html` beside a single output, in the
            current folder for one afar, and `report.html` there for several.
        overwrite: replace an existing file.
    """

def resta(
    *,
    aligned: str | PathLike[str],
    unaligned: str | PathLike[str],
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    gamma: float = 1.0,
    density: float | None = None,
    seed: int = 0,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """RESTA: add the safety vector, a baseline.

    What alignment once added to the weights is added to the fine-tuned ones (arXiv 2402.11746).
    Keywords are the fields of `safeshard.streamer.methods.resta.Resta` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        unaligned: a model without the alignment of `aligned`: its base, or one that lost it.
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        gamma: weight of the safety vector; 0 gives the fine-tuned model.
        density: fraction of the safety vector's entries that DARE keeps (default: no DARE).
        seed: of DARE's random mask.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def ridge(
    *,
    aligned: str | PathLike[str],
    serve: Literal["vllm"] | None = None,
    rank: int | None = None,
    output_format: Literal["adapter", "checkpoint"] | None = None,
    task_data: str | PathLike[str] | None = None,
    keep_data: str | PathLike[str] | None = None,
    recipe: Literal["published"] | None = None,
    calibration: str | PathLike[str] | None = None,
    samples: int = 128,
    max_tokens: int = 512,
    seed: int = 0,
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    factors: str | PathLike[str] | None = None,
    leak: float | None = None,
    penalty: float | None = None,
    rest: Literal["finetuned", "aligned"] = "finetuned",
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """Ridge: shrink a delta where safe inputs excite it.

    The closed form of what Safe Delta approximates; of a LoRA adapter only A changes.
    Keywords are the fields of `safeshard.streamer.methods.ridge.Ridge` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        serve: write the adapter so that this reads it right: scaling 1, one rank that it takes.
        rank: with --serve: truncate to this rank (default: exact).
        output_format: of an adapter's output: adapter, or checkpoint to merge it (default: adapter).
        task_data: prompts of the task, .jsonl; answers are not needed.
        keep_data: with --task-data: other prompts whose answers must stay as they are.
        recipe: published: what is not given is as in the authors' scripts (docs/differences.md).
        calibration: prompts with safe answers: a file, hf://datasets/org/name/file, a URL (default: the built-in).
        samples: prompts to take, by a seeded permutation; fewer only where this is not given.
        max_tokens: longest prompt with answer, in tokens; the rest is cut.
        seed: of the choice of samples.
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        factors: folder that `calibrate` wrote, in place of --calibration.
        leak: share of the delta's energy on safe inputs to let through (default: 0.008).
        penalty: in place of --leak: how much a change on safe inputs costs; 0 changes nothing.
        rest: whose embeddings, norms, biases and head to take.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def safedelta(
    *,
    aligned: str | PathLike[str],
    serve: Literal["vllm"] | None = None,
    rank: int | None = None,
    output_format: Literal["adapter", "checkpoint"] | None = None,
    recipe: Literal["published"] | None = None,
    calibration: str | PathLike[str] | None = None,
    samples: int = 128,
    max_tokens: int = 512,
    seed: int = 0,
    percdamp: float = 0.01,
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    factors: str | PathLike[str] | None = None,
    strength: float = 0.1,
    leak: float | None = None,
    selection: Literal["block", "row"] = "block",
    block_size: int = 2048,
    sub_block: int = 4,
    compensate: bool = True,
    rest: Literal["aligned", "finetuned"] = "aligned",
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """Safe Delta: keep what a safety budget allows.

    The rest of the fine-tuned delta is reverted, and compensated (arXiv 2505.12038).
    Keywords are the fields of `safeshard.streamer.methods.safedelta.SafeDelta` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        serve: write the adapter so that this reads it right: scaling 1, one rank that it takes.
        rank: truncate an adapter's output to this rank (default: exact).
        output_format: of an adapter's output (default: adapter).
        recipe: published: what is not given is as in the authors' scripts (docs/differences.md).
        calibration: prompts with safe answers: a file, hf://datasets/org/name/file, a URL (default: the built-in).
        samples: prompts to take, by a seeded permutation; fewer only where this is not given.
        max_tokens: longest prompt with answer, in tokens; the rest is cut.
        seed: of the choice of samples.
        percdamp: damping of the Gram matrices, as a fraction of the mean diagonal.
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        factors: folder that `calibrate` wrote, in place of --calibration.
        strength: the safety budget s; the paper uses about 0.1 on Llama-2-7B.
        leak: in place of --strength: share of the delta's energy on safe inputs to let through.
        selection: a budget for a block of columns, or for each row.
        block_size: columns selected together; of each, 15 % at least are left aligned.
        sub_block: columns that do not compensate each other; 1 is exact.
        compensate: off: revert what is not kept, without compensation (ablation).
        rest: whose embeddings, norms, biases and head to take.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def safelora(
    *,
    aligned: str | PathLike[str],
    unaligned: str | PathLike[str],
    recipe: Literal["published"] | None = None,
    serve: Literal["vllm"] | None = None,
    rank: int | None = None,
    output_format: Literal["adapter", "checkpoint"] | None = None,
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    threshold: float | None = None,
    num_layers: int | None = None,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """SafeLoRA: project onto the alignment subspace.

    A fine-tuned delta is projected where it points elsewhere (arXiv 2405.16833).
    Keywords are the fields of `safeshard.streamer.methods.safelora.SafeLora` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        unaligned: the base model that `aligned` was trained from.
        recipe: published: what is not given is as in the authors' scripts (docs/differences.md).
        serve: write the adapter so that this reads it right: scaling 1, one rank that it takes.
        rank: with --serve: truncate to this rank (default: exact).
        output_format: of an adapter's output: adapter, or checkpoint to merge it (default: adapter).
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        threshold: project where the cosine is at most this.
        num_layers: project the N modules of lowest cosine, in place of --threshold.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def safemerge(
    *,
    aligned: str | PathLike[str],
    unaligned: str | PathLike[str],
    recipe: Literal["published"] | None = None,
    serve: Literal["vllm"] | None = None,
    rank: int | None = None,
    output_format: Literal["adapter", "checkpoint"] | None = None,
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    safe_adapter: str | PathLike[str] | None = None,
    safe: str | PathLike[str] | None = None,
    threshold: float = 0.35,
    weights: tuple[float, float] = (0.8, 0.2),
    combine: Literal["linear", "dare_linear", "exact", "svd"] = "linear",
    density: float | None = None,
    seed: int = 0,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """SafeMERGE: merge with a safe model, by a gate.

    A fine-tuned delta is merged with a safe one where it left the alignment subspace (arXiv 2503.17239).
    Keywords are the fields of `safeshard.streamer.methods.safemerge.SafeMerge` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        unaligned: the base model that `aligned` was trained from.
        recipe: published: what is not given is as in the authors' scripts (docs/differences.md).
        serve: write the adapter so that this reads it right: scaling 1, one rank that it takes.
        rank: rank that svd truncates to (default: the fine-tuned adapter's).
        output_format: of an adapter's output: adapter, or checkpoint to merge it (default: adapter).
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        safe_adapter: LoRA adapter trained on safety data.
        safe: full checkpoint trained on safety data, in place of --safe-adapter.
        threshold: merge where the cosine is below.
        weights: weights of the fine-tuned and the safe delta.
        combine: linear (PEFT's), dare_linear, exact (concatenated ranks) or svd.
        density: fraction of entries that dare_linear keeps.
        seed: of dare_linear's random mask.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def scale(
    *,
    aligned: str | PathLike[str],
    factor: float,
    serve: Literal["vllm"] | None = None,
    rank: int | None = None,
    output_format: Literal["adapter", "checkpoint"] | None = None,
    adapter: str | PathLike[str] | None = None,
    finetuned: str | PathLike[str] | None = None,
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
) -> Result:
    """Shrink a fine-tuned delta: the baseline.

    Keywords are the fields of `safeshard.streamer.methods.scale.Scale` and of `RunOptions`.

    Args:
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        factor: 0 gives the aligned model, 1 the fine-tuned one.
        serve: write the adapter so that this reads it right: scaling 1, one rank that it takes.
        rank: with --serve: truncate to this rank (default: exact).
        output_format: of an adapter's output: adapter, or checkpoint to merge it (default: adapter).
        adapter: fine-tuned LoRA adapter.
        finetuned: fine-tuned full checkpoint, in place of --adapter.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        output: folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push).
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        overwrite: replace an existing output and discard an unfinished one.
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def score(
    *,
    aligned: str | PathLike[str],
    unaligned: str | PathLike[str],
    adapter: str | Sequence[str] = (),
    finetuned: str | Sequence[str] = (),
    push: str | PathLike[str] | None = None,
    public: bool = False,
    output: str | PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    dequantize: bool = False,
    expert_packing: Literal["peft", "unsloth"] | None = None,
    device: str = "auto",
    memory: int | str = 2147483648,
    io: Literal["auto", "direct", "buffered"] = "auto",
    dry_run: bool = False,
    cache: bool = False,
    cache_budget: int | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    strict: bool = False,
    plot: str | PathLike[str] | None = None,
) -> list[Result]:
    """Measure how far fine-tuned models strayed.

    Cosines of one or many fine-tuned models in one pass over `aligned` and `unaligned`; writes no model.

    Args:
        adapter, finetuned: one source or several of each.
        output: a .csv or .json file for the table.
        plot: a .svg, .png or .pdf file for a picture of the cosines.
        overwrite: replace existing files.
        aligned: aligned model: a folder, hf://org/name@revision, or a URL.
        unaligned: the base model that `aligned` was trained from.
        push: a Hub repository (org/name) to push the output to, private; --output may be left out then.
        public: with --push: make the repository public.
        dtype: dtype of the output (default: the aligned checkpoint's, or the adapter's).
        dequantize: write quantised weights of a full checkpoint in --dtype, or bfloat16.
        expert_packing: how LoRA on fused experts is packed, where its config does not tell.
        device: auto, cpu, cuda or cuda:N.
        memory: host memory for tensors in flight, e.g. 2GiB.
        io: read local files past the page cache (direct) or through it; auto measures where they are larger than
            memory.
        dry_run: print the plan, its bytes and its memory; write nothing.
        cache: keep the shards read from the Hub, whole, in its cache.
        cache_budget: keep at most this much of them there at a time, e.g. 50GB (implies --cache).
        quiet: no progress bar and no summary.
        strict: make warnings errors: nothing that one is about gets its name.
    """

def verify(
    output: str | PathLike[str],
    *,
    inputs: bool = False,
    recompute: int = 0,
    seed: int = 0,
    sources: Mapping[str, str | PathLike[str]] | None = None,
    note: Callable[[str], None] = ...,
    quiet: bool = True,
) -> list[Finding]:
    """Hash a finished output again.

    Returns what differs from its manifest.

    Args:
        inputs: look at the inputs too: are they what was read?
        recompute: how many modules, chosen by `seed`, to compute again from the inputs. Those that changed are refused.
        sources: role -> place of inputs that have moved, and of those that lie at a URL.
        quiet: show no progress.
        note: receives what is worth knowing and is no difference: what was recomputed, what could not be compared.

    Raises:
        RequestError: no manifest, a URL that the manifest alone names, or inputs to recompute from that changed.
        RunError: recomputing failed underway.
    """
