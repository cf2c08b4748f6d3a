"""One pass over the checkpoints: its steps run, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import torch

from safeshard.streamer.clock import Clock
from safeshard.streamer.device import exact_products
from safeshard.streamer.inputs.read import Step
from safeshard.streamer.options import RunOptions
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.calibrated import Compute, planned_steps, run_calibrated
from safeshard.streamer.run.ending.finish import Measured, rounded
from safeshard.streamer.run.flow.bundles import bytes_apart
from safeshard.streamer.run.flow.compute import compute_step
from safeshard.streamer.run.flow.reading import choose_reading, readers_for
from safeshard.streamer.run.flow.steps import module_steps, pass_steps, workers_for
from safeshard.streamer.run.flow.stream import Buffers, run_steps
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.sources import Source


def device_name(device: torch.device) -> str:
    """The device as the manifest names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class Pass:
    """Executes the steps of a set of jobs and measures them.

    `know` gives a run the numbers of all modules of its output, where it waits for them; one that gets none has done
    what it could. `show` makes what shows the progress.
    """

    def __init__(
        self,
        options: RunOptions,
        device: torch.device,
        know: Callable[[JobRun], object] = lambda job_run: job_run.know(job_run.cosines, job_run.curves),
        show: Callable[[int, bool], Progress] = Progress,
    ) -> None:
        self.options, self.device = options, device
        self._know, self._show = know, show
        self.clock = Clock()
        self._sources: list[Source] = []
        self.buffers = Buffers(int(options.memory), pinned=device.type == "cuda")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # else the manifest would tell of earlier runs
        self.started, self._start = datetime.now(timezone.utc), time.perf_counter()

    def execute(self, runs: Sequence[JobRun]) -> None:
        """Decide what needs only its own module; then what needs numbers of all modules, as far as they are known."""
        self._sources = [source for job_run in runs for source in job_run.plan.sources()]
        choose_reading(self.options.io, self._sources)
        with exact_products():
            self._execute(runs)

    def _execute(self, runs: Sequence[JobRun]) -> None:
        steps = pass_steps(runs, self.device)
        ranked = [r for r in runs if r.job.ranks_first]
        second = _bytes(module_steps(ranked))  # at most; what is not chosen then reads less
        with self._show(_bytes(steps) + second + _bytes(planned_steps(runs)), self.options.quiet) as progress:
            self._run(steps, progress)

            def serve(runs: Sequence[JobRun]) -> None:
                run_calibrated(
                    runs,
                    lambda steps, compute: self._run(steps, progress, compute),
                    device=self.device,
                    buffers=self.buffers,
                    clock=self.clock,
                )

            serve([r for r in runs if r.measures])
            for job_run in [r for r in runs if r.waits]:
                self._know(job_run)
            steps = module_steps([r for r in ranked if not r.waits], bytes_apart(self.device))
            progress.extend(_bytes(steps) - second)
            self._run(steps, progress)
            serve([r for r in runs if not r.waits])

    def measured(self) -> Measured:
        """The run so far, for the manifest."""
        cuda = self.device.type == "cuda"
        return Measured(
            device=device_name(self.device),
            start=self.started,
            wall_s=time.perf_counter() - self._start,
            bytes_read=sum(self.clock.bytes.values()),
            peak_buffer_bytes=self.buffers.peak,
            peak_device_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else 0,
            seconds=rounded(self.clock),
        )

    def _run(self, steps: Sequence[Step], progress: Progress, compute: Compute | None = None) -> None:
        run_steps(
            steps,
            compute or (lambda step, loaded: compute_step(step, loaded, self.device, self.clock)),
            buffers=self.buffers,
            clock=self.clock,
            # A step of the calibrated pass may fill the device, so that one runs at a time there.
            workers=1 if compute and self.device.type == "cuda" else workers_for(self.device),
            readers=readers_for(self._sources),
            device=self.device,
            stop=self._stop,
            done=lambda step: progress.done(step.name, step.nbytes + step.copied),
        )

    def _stop(self) -> None:
        for source in self._sources:
            source.stop()


def _bytes(steps: Sequence[Step]) -> int:
    return sum(step.nbytes + step.copied for step in steps)
