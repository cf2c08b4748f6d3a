"""`tune`: make every setting in one pass, evaluate on validation, choose by the rule, confirm on test, write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshard.bench.evaluation.prompts import Prompt
from safeshard.bench.evaluation.run import Evaluate, Evaluating, read_all
from safeshard.bench.evaluation.suite import Suite, read_suite
from safeshard.bench.tune import picture
from safeshard.bench.tune.report import ALIGNED, TUNED, Tuned
from safeshard.bench.tune.rule import Choice, Point, decide
from safeshard.bench.tune.sweep import SETTINGS, Other, Setting, Sweep, read_sweep, settings_of, split
from safeshard.manifests.bounded import read_regular
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.evaluation import Evaluation, Figure, load_evaluation
from safeshard.streamer.disk import replace_file
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import RunOptions, build

if TYPE_CHECKING:
    from safeshard.streamer.run.result import Result

DEFENDED, JOBS, RESULT = "defended", "jobs.yaml", "tune.json"
MAX_JOBS_BYTES = 64 << 20
FREE = 0.8  # of the room on the disk that outputs to choose from may take


def tune(sweep: str | Path, *, device: str = "auto", memory: str = "2GiB", quiet: bool = False) -> Tuned:
    """Try every setting of a sweep and write the one that its rule chooses as `OUTPUT/defended`.

    Args:
        sweep: a YAML file; its form is described in `safeshard.bench.tune.sweep`.
        device, memory: of the defences, as for `batch`; the device also of what answers.

    Returns:
        The choice, and the figures of validation and test. OUTPUT holds them: tune.json, README.md, tradeoff.png, .svg.

    Raises:
        RequestError: something is wrong with the request; all of it. Nothing was written.
        RunError: it failed underway. The same call goes on from there.
    """
    return _Tuning(read_sweep(Path(sweep)), {"device": device, "memory": memory, "quiet": quiet}).run()


class _Tuning:
    """One call of `tune`."""

    def __init__(self, sweep: Sweep, options: Mapping[str, Any]) -> None:
        from safeshard.streamer.plan.written.places import place_offences  # it needs torch

        self.sweep, self.options, self.output = sweep, build(RunOptions, options), sweep.output
        self.settings, jobs = settings_of(sweep)
        self.jobs = {setting.folder: job for setting, job in zip(self.settings, jobs, strict=True)}
        self.suite = self.trial = read_suite(sweep.suite, sweep.prompts, sweep.grader_model)
        if isinstance(sweep.validation, Other):
            self.trial = read_suite(sweep.validation.suite, sweep.prompts, sweep.grader_model)
            self.validation, self.test = read_all(self.trial), read_all(self.suite)
        else:
            self.validation, self.test = split(read_all(self.suite), sweep.validation)
        self.given = {ALIGNED: sweep.aligned, TUNED: sweep.tuned}
        offences = list(dict.fromkeys(o for suite in (self.suite, self.trial) for o in _lacking(suite)))
        unusable = list(place_offences(self.output, ()))
        offences += unusable
        filled = not unusable and self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))
        if filled and not _is_tuning(self.output):
            offences.append(
                Offence("output", str(self.output), "a new folder, or a tuning's", "another", "choose another")
            )
        if offences:
            raise RequestError(offences)
        picture.pyplot()  # fail before the work without it

    def run(self) -> Tuned:
        """Validation, choice, test, output."""
        self._evaluating(self.given, self.trial, self.validation, "given")  # refuses what is wrong with the models
        waves = self._waves()
        for wave in waves:
            self._run([self.jobs[setting.folder] for setting in wave], dry_run=True)
        self.output.mkdir(parents=True, exist_ok=True)
        entries = [
            json.loads(job.model_dump_json(exclude_unset=True)) | {"method": job.method} for job in self.jobs.values()
        ]
        replace_file(self.output / JOBS, (json.dumps({"jobs": entries}, indent=1) + "\n").encode())

        before = self._evaluating(self.given, self.trial, self.validation, "validation-given").run()
        tried = [self._wave(number, wave, len(waves) > 1) for number, wave in enumerate(waves, 1)]
        figures = [*before.figures, *(figure for evaluation in tried for figure in evaluation.figures)]
        aligned, tuned = (_point(figures, name, name, "") for name in self.given)
        points = {s.folder: _point(figures, s.folder, s.method, s.setting) for s in self.settings}
        choice = decide([*points.values()], aligned, tuned, self.sweep.margin)
        self._publish(choice)
        test = self._confirm(choice)
        for name in ("tradeoff.png", "tradeoff.svg"):  # to look at, and for a paper
            picture.draw([*points.values()], {ALIGNED: aligned, TUNED: tuned}, choice, self.output / name)
        made = Tuned(self.sweep, choice, [aligned, tuned, *points.values()], tuple(figures), test)
        replace_file(self.output / "README.md", made.markdown().encode(errors="backslashreplace"))
        replace_file(self.output / RESULT, made.to_json().encode())
        return made

    def _run(self, jobs: Sequence[Job], **options: bool) -> list[Result]:
        from safeshard.streamer.run.runner import run  # it needs torch

        return run(jobs, self.options.model_copy(update=options), skip_finished=True)

    def _waves(self) -> list[list[Setting]]:
        """All settings at once, or in as many passes as it takes where the disk has no room for all outputs."""
        first = {job.method: job for job in reversed(self.jobs.values())}
        largest = max(self._run([job], dry_run=True)[0].plan.bytes_to_write for job in first.values())
        place = next(p for p in (self.output, *self.output.absolute().parents) if p.exists())
        at_once = max(1, int(shutil.disk_usage(place).free * FREE) // max(1, largest))
        return [self.settings[n : n + at_once] for n in range(0, len(self.settings), at_once)]

    def _wave(self, number: int, wave: Sequence[Setting], remove: bool) -> Evaluation:
        """Make some of the settings and ask them the validation prompts; `remove` what was made once it answered."""
        folder = self.output / f"validation-{number}"
        facts = json.dumps([setting.entry for setting in wave], sort_keys=True)
        if remove and (folder / "done.json").is_file() and (folder / "done.json").read_text() == facts:
            return load_evaluation(folder)
        self._run([self.jobs[setting.folder] for setting in wave])
        models = {setting.folder: str(self.output / SETTINGS / setting.folder) for setting in wave}
        evaluation = self._evaluating(models, self.trial, self.validation, folder.name).run()
        if remove:
            replace_file(folder / "done.json", facts.encode())
            for place in models.values():
                shutil.rmtree(place)
        return evaluation

    def _publish(self, choice: Choice) -> None:
        """Write the chosen setting as an output of its own."""
        chosen = self._setting(choice.chosen)
        job = self.jobs[chosen.folder].model_copy(update={"output": self.output / DEFENDED})
        try:
            self._run([job])
        except RequestError:  # an earlier tuning's is there, which chose otherwise
            self._run([job], overwrite=True)

    def _confirm(self, choice: Choice) -> Evaluation:
        """Ask the test prompts of what was given, of the chosen setting, and of the best factor of `scale`."""
        models = self.given | {"defended": str(self.output / DEFENDED)}
        best = self._setting(choice.best["scale"])
        if choice.chosen.method != "scale" and (place := self.output / SETTINGS / best.folder).exists():
            models["scale"] = str(place)
        return self._evaluating(models, self.suite, self.test, "test").run()

    def _setting(self, point: Point) -> Setting:
        return next(s for s in self.settings if (s.method, s.setting) == (point.method, point.setting))

    def _evaluating(
        self, models: Mapping[str, str], suite: Suite, prompts: Mapping[str, list[Prompt]], folder: str
    ) -> Evaluating:
        sweep = self.sweep
        settings = build(
            Evaluate,
            {"suite": suite.name, "output": self.output / folder, "aligned": sweep.aligned, "engine": sweep.engine,
             "batch_size": sweep.batch_size, "device": self.options.device, "quiet": self.options.quiet},
        )  # fmt: skip
        return Evaluating(models, suite, settings, prompts)


def _is_tuning(folder: Path) -> bool:
    """Whether a folder is a tuning's: its jobs file, which will be replaced, is one that `tune` wrote."""
    try:
        jobs = json.loads(read_regular(folder / JOBS, MAX_JOBS_BYTES))["jobs"]
        return bool(jobs) and all(Path(job["output"]).parent.name == SETTINGS for job in jobs)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _lacking(suite: Suite) -> list[Offence]:
    """What the rule needs of a suite."""
    measured = {part.measures for part in suite.parts}
    return [
        Offence("suite", suite.name, f"a part that measures {need}, for the rule", "none")
        for need in ("attack_success", "utility")
        if need not in measured
    ]


def _point(figures: Sequence[Figure], name: str, method: str, setting: str) -> Point:
    """Attack success and utility of a model, each the mean over its parts, in percent.

    Raises:
        RequestError: a figure is missing, since no answer could be graded.
    """
    shares = []
    for measure in ("attack_success", "utility"):
        values = [f.value for f in figures if f.model == name and f.measure == measure]
        if not values or None in values:
            raise RequestError(Offence(name, measure, "answers that could be graded", "none"))
        shares.append(100 * sum(v for v in values if v is not None) / len(values))
    return Point(method, setting, *shares)
