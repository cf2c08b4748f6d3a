"""Two processes of one torch thread each, and tasks that wait for each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import torch

from safeshard.streamer.extras import require, require_installed

PROCESSES = 2
LIBRARIES = ["safeshard.bench.toy.experiment", "peft", "transformers.models.llama.modeling_llama"]  # imported once


@dataclass(frozen=True)
class Task:
    """A call of a function that can be pickled, once the tasks named in `after`, of those that there are, returned."""

    name: tuple[int, str]  # seed, and what is made
    after: frozenset[tuple[int, str | None]]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def import_libraries() -> None:
    """Start the process that the workers are forked from, so that it imports while the caller goes on.

    Raises:
        RequestError: a package that the toy models need is not installed.
    """
    for package in ("transformers", "tokenizers", "peft"):
        require_installed(package, "bench")
    multiprocessing.set_forkserver_preload(LIBRARIES)
    forkserver.ensure_running()


def run_tasks(tasks: Sequence[Task], done: Callable[[Task, Any], None]) -> None:
    """Run tasks, the earlier first where two are ready; call `done` with each and with what it returned."""
    waiting, running = list(tasks), dict[Future[Any], Task]()
    if not tasks:
        return
    import_libraries()
    pool = ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("forkserver"), initializer=_prepare)
    try:
        while waiting or running:
            missing = {task.name for task in (*waiting, *running.values())}
            for task in [task for task in waiting if missing.isdisjoint(task.after)]:
                waiting.remove(task)
                running[pool.submit(task.function, *task.arguments)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done(running.pop(future), future.result())
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    transformers = require("transformers", "bench")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
