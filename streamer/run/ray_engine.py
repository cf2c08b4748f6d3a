"""A batch on a Ray cluster: its parts are tasks, which Ray places by resources and starts again where one is lost.

What a lost part had done lies beside its outputs, so that another node goes on from there; nothing but progress goes
through Ray. All nodes see the same files, or the outputs lie in a bucket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from safeshard.manifests.errors import Offence, RequestError, RunError, SafeshardError, printable
from safeshard.manifests.sizes import human
from safeshard.streamer.extras import require
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import RunOptions
from safeshard.streamer.plan.parts import Part
from safeshard.streamer.plan.planner import Planner
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.downloads import shard_cache
from safeshard.streamer.run.part_work import hub_offences
from safeshard.streamer.run.parts import gather, run_part
from safeshard.streamer.run.result import Result
from safeshard.streamer.run.runner import run
from safeshard.streamer.write.shelf_afar import shelf_of

RETRIES = 20  # of a part whose worker or node was lost: one that dies of itself must end some day
PROCESS_BYTES = 1 << 30  # what a worker holds besides the tensors in flight
GPU_CPUS = 8  # cores that a part on a GPU has use for
STORE_BYTES = 100 << 20  # of Ray's shared memory on this machine: no tensor goes there
TELL_SECONDS = 0.5  # between two words of a part about its progress
Resources = Mapping[str, float]


def run_on_ray(jobs: Sequence[Job], options: RunOptions, count: int | None = None) -> list[Result]:
    """Do all parts of a batch as tasks of a Ray cluster, or of this machine where there is none, and put them together.

    Raises:
        RequestError: Ray is not installed, no node can take a part, or a job is refused.
        RunError: a part failed; the same call resumes.
    """
    ray = require("ray", "ray")
    if options.device.startswith("cuda:"):
        raise RequestError(Offence("--device", "", "cuda, of which Ray gives each part its own", options.device))
    if options.dry_run:
        return run(jobs, options, skip_finished=True)
    plans = Planner(shard_cache(options)).plan(jobs, options.overwrite, skip_finished=True)
    if offences := list(hub_offences(plans)):
        raise RequestError(offences)  # before a task starts
    with contextlib.redirect_stdout(sys.stderr), _cluster(ray):  # Ray's own words, where stdout is for JSON
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs, slots = resources_of_a_part(nodes, options)
        there = {part.count for plan in plans if not plan.finished for part in shelf_of(plan.job).there()}
        left = Part.all(count or (there.pop() if len(there) == 1 else slots))
        for _ in range(2):  # what needs numbers of all parts takes a second round
            left = _round(ray, jobs, options, left, needs) if left else []
    return gather(jobs, options)


def resources_of_a_part(nodes: Sequence[Resources], options: RunOptions) -> tuple[dict[str, float], int]:
    """What a part asks Ray for, given the resources of each node, and how many such the nodes have.

    A GPU and some cores where there are GPUs; else the cores of a node.

    Raises:
        RequestError: no node has as much.
    """
    on_gpu = options.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
    if options.device == "cuda" and not on_gpu:
        raise RequestError(Offence("--device", "", "a GPU in the cluster", "none", "use --device cpu"))
    memory = int(options.memory) + PROCESS_BYTES
    fit = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("memory", 0) >= memory]
    fit = [node for node in fit if not on_gpu or node.get("GPU", 0) >= 1]
    if not fit:
        most = human(max((node.get("memory", 0) for node in nodes), default=0))
        expected = f"a node with {human(memory)} of memory{' and a GPU' * on_gpu}"
        raise RequestError(Offence("--engine ray", "", expected, f"at most {most} on a node", "lower --memory"))
    if on_gpu:
        cpus = min(GPU_CPUS, *(node["CPU"] // node["GPU"] or 1 for node in fit))
        return {"num_gpus": 1, "num_cpus": cpus, "memory": memory}, sum(int(node["GPU"]) for node in fit)
    return {"num_gpus": 0, "num_cpus": min(int(node["CPU"]) for node in fit), "memory": memory}, len(fit)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Inside, Ray is connected: to the cluster that there is, or to one of this machine."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here: nothing is reported
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    settings = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        try:
            ray.init(address="auto", **settings)
        except ConnectionError:
            ray.init(include_dashboard=False, object_store_memory=STORE_BYTES, **settings)
    except Exception as error:  # which is all that Ray says where it does not start in time
        raise RunError(f"Ray did not start: {printable(error)}", "look at its logs, then run again") from error
    if main:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process without a word
    try:
        yield
    finally:
        ray.shutdown()


def _round(
    ray: Any, jobs: Sequence[Job], options: RunOptions, parts: Sequence[Part], needs: Mapping[str, float]
) -> list[Part]:
    """Do parts, and show their progress as one; the parts that wait for the numbers of others.

    Raises:
        RequestError: all that failed was refused.
        RunError: some failed.
    """
    pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=pin)(_Board).remote()
    task = ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD", **needs)(_do)
    here, quiet = os.getcwd(), options.model_copy(update={"quiet": True})  # noqa: PTH109
    tasks = {task.remote(jobs, quiet, part, here, version("safeshard"), board): part for part in parts}
    ended: dict[Part, Any] = {}
    shown = (0, 0)
    with Progress(0, options.quiet) as bar:
        try:
            while tasks:
                done, _ = ray.wait(list(tasks), timeout=1.0)
                for each in done:
                    part = tasks.pop(each)
                    ended[part] = _outcome(ray, each, part)
                with contextlib.suppress(ray.exceptions.RayError):  # progress is not worth an end
                    total, count, name = ray.get(board.read.remote(), timeout=10)
                    bar.extend(total - shown[0])
                    bar.done(name or "waiting for nodes", count - shown[1])
                    shown = total, count
        finally:
            for each in tasks:
                ray.cancel(each, force=True)
            ray.kill(board)
    errors = [error for error in ended.values() if isinstance(error, SafeshardError)]
    if errors and all(isinstance(error, RequestError) for error in errors):
        raise RequestError(list(dict.fromkeys(o for e in errors if isinstance(e, RequestError) for o in e.offences)))
    if errors:
        raise RunError("; ".join(dict.fromkeys(map(str, errors))), "the same command goes on from here")
    return [part for part in parts if ended[part]]


def _outcome(ray: Any, task: Any, part: Part) -> Any:
    """Whether a part that has ended waits for others, or why it failed."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return RunError(f"part {part}: {str(error).strip().splitlines()[-1]}")


def _do(
    jobs: Sequence[Job], options: RunOptions, part: Part, folder: str, release: str, board: Any
) -> bool | SafeshardError:
    """A part, on whatever node: whether it waits for the numbers of others, or why it failed."""
    if release != version("safeshard"):
        offence = Offence("--engine ray", f"part {part}", f"safeshard {release} on every node", version("safeshard"))
        return RequestError(offence)
    try:
        os.chdir(folder)
        results = run_part(jobs, options, part, partial(_Relay, board, part.number))
    except SafeshardError as error:
        return error
    except OSError as error:
        return RunError(f"part {part}: {printable(error)}")
    return any(result.record is None and result.manifest is None for result in results)


class _Board:
    """An actor that knows how far each part is."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, int]] = {}
        self._last = ""

    def tell(self, part: int, total: int, done: int, name: str) -> None:
        """Note how much a part has to do, as far as its worker knows, and what of it is done."""
        self._parts[part], self._last = (total, done), name

    def read(self) -> tuple[int, int, str]:
        """The sums over all parts, and what was done last."""
        totals, counts = zip(*self._parts.values(), strict=True) if self._parts else ((), ())
        return sum(totals), sum(counts), self._last


class _Relay(Progress):
    """Progress of a part, told to the board."""

    def __init__(self, board: Any, part: int, total: int, quiet: bool) -> None:
        super().__init__(total, quiet=True)
        self._tell: Callable[[str], None] = lambda name: board.tell.remote(part, self._total, self._done, name)
        self._said = 0.0

    def __enter__(self) -> Progress:
        self._tell("")
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("")

    def done(self, name: str, count: int) -> None:
        super().done(name, count)
        if time.monotonic() - self._said > TELL_SECONDS:
            self._said = time.monotonic()
            self._tell(name)
