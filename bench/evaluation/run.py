"""`evaluate`: models, a suite, and a folder of results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field

from safeshard.bench.evaluation import card, figures, harness, results
from safeshard.bench.evaluation.asking import Done, ask, grade, grade_by_model
from safeshard.bench.evaluation.engines.inspect import SCHEME
from safeshard.bench.evaluation.engines.open import Engines, Kind, is_adapter, versions
from safeshard.bench.evaluation.graders.base import Verdict
from safeshard.bench.evaluation.names import display_names, shown
from safeshard.bench.evaluation.prompts import Prompt, read_prompts
from safeshard.bench.evaluation.store import FILE as STORE
from safeshard.bench.evaluation.store import Store, key_of
from safeshard.bench.evaluation.suite import Part, Suite, read_suite
from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.evaluation import EvaluatedModel, Evaluation, Figure
from safeshard.manifests.schema import load
from safeshard.streamer.extras import require
from safeshard.streamer.options import Folder, Options, Place, RunOptions, build
from safeshard.streamer.progress import Progress


class Evaluate(Options):
    """What `evaluate` takes."""

    suite: Place = Field(description="a YAML file, or a built-in suite by name")
    output: Folder = Field(description="folder for the results; a rerun goes on there")
    aligned: Place | None = Field(None, description="the model that adapters are for")
    engine: Kind = Field("transformers", description="what runs local models: transformers, or vllm through inspect_ai")
    grader_model: str | None = Field(None, description="guard or judge to ask, in place of the suite's")
    batch_size: int = Field(16, gt=0, description="prompts that are asked together")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    write_card: bool = Field(False, description="also write the figures into the model cards of safeshard's outputs")
    quiet: bool = Field(False, description="no progress bar and no table")


def evaluate(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *,
    prompts: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    suite: str | os.PathLike[str] | Suite, **options: Any,
) -> Evaluation:  # fmt: skip
    """Ask models the prompts of a suite and grade what they answer.

    Args:
        models: checkpoints and adapters, each a folder or `org/name`; or `inspect://PROVIDER/MODEL`.
        prompts: a file for the parts that leave their prompts to you, or a mapping of parts to files.
        suite: a YAML file, a built-in suite's name, or a Suite.
        options: the other fields of `Evaluate`; `output` is required.

    Returns:
        All figures. `output` holds them as evaluation.json, table.csv and table.md, and every answer in answers.jsonl.

    Raises:
        RequestError: something is wrong with the request; all of it. No model was asked.
        RunError: a model does not load, or answers failed. The same call goes on from there.
    """
    settings = build(Evaluate, {**options, "suite": suite.name if isinstance(suite, Suite) else str(suite)})
    files = {"": prompts} if isinstance(prompts, str | os.PathLike) else prompts or {}
    if not isinstance(suite, Suite):
        given = {part: os.fspath(file) for part, file in files.items()}
        suite = read_suite(suite if isinstance(suite, str) else Path(suite), given, settings.grader_model)
    named = [os.fspath(m) for m in ([models] if isinstance(models, str | os.PathLike) else models)]
    return Evaluating(dict(zip(display_names(named), named, strict=True)), suite, settings).run()


class Evaluating:
    """One call of `evaluate`: checked when it is made, run once.

    Args:
        models: by the names that figures call them.
        prompts: by part, in place of those that the suite names.
    """

    def __init__(
        self, models: Mapping[str, str], suite: Suite, settings: Evaluate,
        prompts: Mapping[str, list[Prompt]] | None = None,
    ) -> None:  # fmt: skip
        self.suite, self.settings = suite, settings
        self.device = build(RunOptions, {"device": settings.device}).resolved_device()
        self.engines = Engines(settings.engine, self.device, settings.batch_size)
        self.models = dict(models)
        self.failed = 0
        offences = list(dict.fromkeys(self._offences()))
        self.prompts: dict[str, list[Prompt]] = {}
        try:
            self.prompts = dict(prompts) if prompts is not None else read_all(suite)
        except RequestError as error:
            offences += error.offences
        if offences:
            raise RequestError(offences)

    def run(self) -> Evaluation:
        """Answer, grade, write."""
        answers: dict[str, dict[str, list[str]]] = {}
        total = sum(map(len, self.prompts.values())) * len(self.models)
        asked_by_model = sum(len(self.prompts[p.name]) for p in self.suite.parts if p.grader and p.grader.asks)
        with (
            Store(self.settings.output) as store,
            Progress(total + asked_by_model * len(self.models), self.settings.quiet, unit="answer") as bar,
        ):
            for name, model in self.models.items():
                answers[name] = self._answers(name, model, store, bar.done)
            scores = {name: self._harness(model, store) for name, model in self.models.items()}
            verdicts = self._verdicts(answers, store, bar.done)
            found = [*self._figures(answers, verdicts, scores)]
            evaluation = Evaluation(
                suite=self.suite.name, engine=self.settings.engine,
                versions=versions(["safeshard", "torch", "transformers", "peft", "vllm", "inspect_ai", "lm_eval"]),
                models=(), figures=tuple(found),
            )  # fmt: skip
            if self.settings.write_card:
                for name, model in self.models.items():
                    card.write(Path(model), evaluation, name)
            models = tuple(self._model(name, model) for name, model in self.models.items())  # as cards left them
            evaluation = evaluation.model_copy(update={"models": models})
            results.write(self.settings.output, evaluation, self.suite, self.prompts, answers, verdicts)
        if self.failed:
            raise RunError(
                f"{self.failed} verdicts failed, and count as not graded in {self.settings.output}",
                "see answers.jsonl for why; run the same command again to ask for them anew",
            )
        return evaluation

    def _offences(self) -> Iterator[Offence]:
        """What is wrong with models and output, before anything is loaded."""
        from safeshard.streamer.plan.written.places import place_offences  # it needs torch

        if not self.models:
            yield Offence("evaluate", "", "a model", "none")
        for name, model in self.models.items():
            yield from self.engines.offences(model, self.settings.aligned)
            if self.settings.write_card and not (Path(model) / "manifest.json").is_file():
                yield Offence("--write-card", name, "an output of safeshard", "no manifest.json")
            elif self.settings.write_card:
                yield from _unfit(Path(model))
            if not model.startswith(SCHEME) and any(part.harness for part in self.suite.parts):
                require("lm_eval", "evaluate")
            elif any(part.harness for part in self.suite.parts):
                yield Offence(name, "", "a checkpoint or adapter, for lm-evaluation-harness", model)
        for part in self.suite.parts:
            if part.grader is not None and part.grader.asks:
                yield from self.engines.offences(part.grader.model, None)  # type: ignore[union-attr]
        if self.settings.aligned is not None:
            yield from self.engines.offences(self.settings.aligned, None)
        output = self.settings.output
        if unusable := list(place_offences(output, ())):
            yield from unusable
            return
        filled = output.exists() and (not output.is_dir() or any(output.iterdir()))
        if filled and not (output / STORE).is_file():
            yield Offence("--output", str(output), "a new folder, or an evaluation's", "another one", "choose another")

    def _answers(self, name: str, model: str, store: Store, done: Done) -> dict[str, list[str]]:
        identity = self.engines.identity(model, self.settings.aligned)
        with closing(self.engines.lazy(model, self.settings.aligned)) as engine:
            return ask(engine, self.suite, self.prompts, name, identity, store, done)

    def _harness(self, model: str, store: Store) -> dict[str, harness.Scores]:
        scores = {}
        for part in self.suite.parts:
            if part.harness is not None:
                aligned = self.settings.aligned
                facts = [self.engines.identity(model, aligned), part.harness.model_dump(mode="json")]
                key = key_of("harness", *facts, versions(["lm_eval"]))
                if (known := store.get(key)) is None:
                    found = harness.run_harness(part.harness, model, aligned, self.device, self.settings.batch_size)
                    known = [harness.to_text(found)]
                    store.put(key, known)
                scores[part.name] = json.loads(known[0])
        return scores

    def _verdicts(
        self, answers: Mapping[str, Mapping[str, Sequence[str]]], store: Store, done: Done
    ) -> dict[tuple[str, str], list[Verdict]]:
        """Verdicts by model and part; each grader's model is opened once."""
        verdicts: dict[tuple[str, str], list[Verdict]] = {}
        by_model: dict[str, list[Part]] = {}
        for part in self.suite.parts:
            if part.prompts is None or part.grader is None:
                continue
            if part.grader.asks:
                by_model.setdefault(part.grader.model, []).append(part)  # type: ignore[union-attr]
                continue
            for name in self.models:
                verdicts[name, part.name] = grade(part, self.prompts[part.name], answers[name][part.name])
        for asked, parts in by_model.items():
            identity = ["grader", self.engines.identity(asked, None)]
            with closing(self.engines.lazy(asked, None)) as engine:
                for part in parts:
                    for name in self.models:
                        verdicts[name, part.name], failed = grade_by_model(
                            engine, part, self.prompts[part.name], answers[name][part.name], identity, store, done
                        )
                        self.failed += failed
        return verdicts

    def _figures(
        self, answers: Mapping[str, Mapping[str, Sequence[str]]], verdicts: Mapping[tuple[str, str], Sequence[Verdict]],
        scores: Mapping[str, Mapping[str, harness.Scores]],
    ) -> Iterator[Figure]:  # fmt: skip
        for part in self.suite.parts:
            for name in self.models:
                if part.harness is not None:
                    yield from harness.figures(name, part.name, part.harness, scores[name][part.name])
                else:
                    yield figures.figure(name, self.suite, part, answers[name][part.name], verdicts[name, part.name])

    def _model(self, name: str, model: str) -> EvaluatedModel:
        sealed = load(Path(model)).blake3 if (Path(model) / "manifest.json").is_file() else None
        base = self.settings.aligned if is_adapter(model) else None
        return EvaluatedModel(name=name, source=shown(model), base=base and shown(base), manifest_blake3=sealed)


def _unfit(output: Path) -> Iterator[Offence]:
    """What keeps figures from an output's card."""
    for look in (load, card.read):
        try:
            look(output)
        except RequestError as error:
            yield from error.offences


def read_all(suite: Suite) -> dict[str, list[Prompt]]:
    """The prompts of a suite by part.

    Raises:
        RequestError: some cannot be read, or lack what their grader compares with; all of them.
    """
    prompts: dict[str, list[Prompt]] = {}
    offences: list[Offence] = []
    for part in suite.parts:
        try:
            if part.prompts is not None:
                prompts[part.name] = _checked(part, suite.name)
        except RequestError as error:
            offences += error.offences
    if offences:
        raise RequestError(offences)
    return prompts


def _checked(part: Part, suite: str) -> list[Prompt]:
    """A part's prompts; refused where a grader that compares has nothing to compare with."""
    assert part.prompts is not None
    found = read_prompts(part.prompts, f"{suite}: part {part.name}", part.system)
    bare = sum(not prompt.target for prompt in found)
    if part.grader is not None and part.grader.needs_target and bare:
        expected = f"prompts with what is expected, for {part.grader.name}"
        raise RequestError(Offence(f"{suite}: part {part.name}", part.prompts.source, expected, f"{bare} without"))
    return found
