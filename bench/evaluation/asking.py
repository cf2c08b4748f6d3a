"""Asking and grading: batches of fixed make-up, kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safeshard.bench.evaluation.engines.base import Engine
from safeshard.bench.evaluation.graders.base import Verdict
from safeshard.bench.evaluation.prompts import Message, Prompt
from safeshard.bench.evaluation.store import Store, key_of
from safeshard.bench.evaluation.suite import Part, Sampling, Suite
from safeshard.manifests.errors import RunError

VERDICT_TOKENS = 512
Asked = Mapping[str, Sequence[Prompt]]  # prompts by part
Done = Callable[[str, int], None]  # what was done, and how many of it


def ask(
    engine: Engine, suite: Suite, prompts: Asked, name: str = "", identity: Any = None,
    store: Store | None = None, done: Done = lambda *_: None,
) -> dict[str, list[str]]:  # fmt: skip
    """Answers by part, in the order of the prompts.

    Parts of the same sampling share batches.

    Args:
        identity: what decides the model's answers, as JSON values; with `store`, what is there is not asked again.

    Raises:
        RunError: an answer failed. What was answered before is kept.
    """
    groups: dict[Sampling, list[tuple[str, Prompt]]] = {}
    for part in suite.parts:
        if part.prompts is not None:
            groups.setdefault(suite.sampling_of(part), []).extend((part.name, p) for p in prompts[part.name])
    answers: dict[str, list[str]] = {part.name: [] for part in suite.parts if part.prompts is not None}
    for sampling, asked in groups.items():
        for start in range(0, len(asked), engine.batch):
            batch = asked[start : start + engine.batch]
            texts, errors = _batch(engine, [p.messages for _, p in batch], sampling, identity, store)
            if errors:
                first = next(iter(errors.values()))
                remedy = "run the same command again: what was answered is kept"
                raise RunError(f"{name}: {len(errors)} of {len(batch)} answers failed: {first}", remedy)
            for (part_name, _), text in zip(batch, texts, strict=True):
                answers[part_name].append(text)
            done(name, len(batch))
    return answers


def grade(part: Part, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
    """Verdicts of a grader that judges by itself."""
    assert part.grader is not None
    return [part.grader.grade(part.measures, p, a) for p, a in zip(prompts, answers, strict=True)]


def grade_by_model(
    engine: Engine, part: Part, prompts: Sequence[Prompt], answers: Sequence[str],
    identity: Any = None, store: Store | None = None, done: Done = lambda *_: None,
) -> tuple[list[Verdict], int]:  # fmt: skip
    """Verdicts of a grader that asks a model, and how many of its calls failed.

    A call that fails is a verdict of None, as a reply is that makes no sense; a batch with a failed call is asked anew
    the next time.
    """
    grader = part.grader
    assert grader is not None
    verdicts: list[Verdict] = []
    failed = 0
    sampling = Sampling(max_tokens=VERDICT_TOKENS)
    questions = [grader.questions(p, a) for p, a in zip(prompts, answers, strict=True)]
    for start in range(0, len(questions), engine.batch):
        batch = questions[start : start + engine.batch]
        texts, errors = _batch(engine, batch, sampling, identity, store)
        failed += len(errors)
        verdicts += [
            Verdict(None, f"failed: {errors[n]}") if n in errors else grader.read(part.measures, text)
            for n, text in enumerate(texts)
        ]
        done(grader.label, len(batch))
    return verdicts, failed


def _batch(
    engine: Engine, conversations: Sequence[Sequence[Message]], sampling: Sampling, identity: Any, store: Store | None
) -> tuple[list[str], dict[int, str]]:
    """Texts of a batch, and errors by their place in it. A batch has a seed of its own."""
    key = key_of(identity, conversations, sampling.model_dump())
    if store is not None and (known := store.get(key)) is not None and len(known) == len(conversations):
        return known, {}
    seed = int(key_of(conversations, sampling.seed)[:7], 16)
    given = engine.answers(conversations, sampling.model_copy(update={"seed": seed}))
    errors = {n: answer.error for n, answer in enumerate(given) if answer.error}
    texts = [answer.text for answer in given]
    if store is not None and not errors:
        store.put(key, texts)
    return texts, errors
