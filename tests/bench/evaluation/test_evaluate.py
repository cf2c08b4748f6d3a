"""An evaluation from end to end: figures to the digit, the same whatever interrupted it, no verdict dropped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.bench.evaluation import evaluate
from safeshard.bench.evaluation.engines.base import Answer
from safeshard.bench.evaluation.engines.transformers import Loader, rendered
from safeshard.bench.evaluation.names import display_names
from safeshard.bench.evaluation.suite import Sampling, Suite
from safeshard.bench.toy.tokenizer import make_tokenizer
from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.evaluation import load_evaluation
from safeshard.streamer.cli.app import main

Ruled = Callable[[Callable[[str, str], Answer]], list[str]]


def items(count: int, target: str = "", first: int = 0) -> dict[str, Any]:
    return {"items": [{"prompt": f"question {first + n}", "target": target} for n in range(count)]}


def suite(**harmful: Any) -> Suite:
    return Suite.model_validate(
        {
            "name": "s",
            "parts": [
                {"name": "harmful", "measures": "attack_success", "prompts": items(20), "grader": "refusal"} | harmful,
                {"name": "harmless", "measures": "over_refusal", "prompts": items(10, first=100), "grader": "refusal"},
                {"name": "task", "measures": "utility", "prompts": items(8, "7", 200), "grader": "exact"},
            ],
        }
    )


def rule(model: str, asked: str) -> Answer:
    """The good model refuses odd questions, the bad one none."""
    refuses = model.endswith("good") and int(asked.split()[1]) % 2
    return Answer("I cannot do that." if refuses else "7")


def test_figures_to_the_digit(tmp_path: Path, models: list[str], ruled: Ruled) -> None:
    ruled(rule)
    made = evaluate(models, suite=suite(), output=tmp_path / "out", batch_size=7, quiet=True)
    shown = {(f.model, f.part): (f.value, round(f.low, 4), round(f.high, 4), f.prompts) for f in made.figures}
    assert shown == {
        ("good", "harmful"): (0.5, 0.2993, 0.7007, 20), ("bad", "harmful"): (1.0, 0.8389, 1.0, 20),
        ("good", "harmless"): (0.5, 0.2366, 0.7634, 10), ("bad", "harmless"): (0.0, 0.0, 0.2775, 10),
        ("good", "task"): (0.5, 0.2152, 0.7848, 8), ("bad", "task"): (1.0, 0.6756, 1.0, 8),
    }  # fmt: skip
    assert load_evaluation(tmp_path / "out") == made
    for figure in made.figures:
        assert figure.sampling == "greedy"
        assert figure.max_tokens == 512
        assert figure.ungraded == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 38
    assert {line["value"] for line in lines} == {0.0, 1.0}
    assert (tmp_path / "out" / "table.csv").read_text().count("\n") == 7
    assert (
        "| good | harmful | attack success | 50.0 | 29.9 to 70.1 | 20 |" in (tmp_path / "out" / "table.md").read_text()
    )


def test_an_endpoint_that_goes_down_is_asked_on_from_there(tmp_path: Path, models: list[str], ruled: Ruled) -> None:
    whole = tmp_path / "whole"
    ruled(rule)
    evaluate(models, suite=suite(), output=whole, batch_size=5, quiet=True)

    def fails(model: str, asked: str) -> Answer:
        return Answer(error="connection refused") if len(calls) > 4 else rule(model, asked)

    calls = ruled(fails)
    with pytest.raises(RunError, match=r"good: 5 of 5 answers failed: connection refused \(run the same command"):
        evaluate(models, suite=suite(), output=tmp_path / "out", batch_size=5, quiet=True)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    with (tmp_path / "out" / "asked.jsonl").open("ab") as torn:
        torn.write(b'{"key": "torn')
    again = ruled(rule)
    evaluate(models, suite=suite(), output=tmp_path / "out", batch_size=5, quiet=True)
    assert len(again) == 2 * 8 - 4
    for file in ("answers.jsonl", "table.csv", "table.md", "evaluation.json", "asked.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()
    none = ruled(rule)
    evaluate(models, suite=suite(), output=tmp_path / "out", batch_size=5, quiet=True)
    assert not none


def test_judges_that_fail_or_talk_nonsense_are_counted(tmp_path: Path, models: list[str], ruled: Ruled) -> None:
    up = False

    def judged(model: str, asked: str) -> Answer:
        if not model.startswith("inspect://"):
            return rule(model, asked)
        number = int(asked.split("question ")[1].split()[0])
        if number == 3 and not up:
            return Answer(error="timed out")
        if number == 4:
            return Answer("I would rather not say.")
        return Answer("score: 1" if "cannot" in asked else "score: 5")

    ruled(judged)
    grader = {"name": "judge", "model": "inspect://mockllm/judge"}
    request: dict[str, Any] = {"output": tmp_path / "out", "batch_size": 6, "quiet": True}
    with pytest.raises(RunError, match="2 verdicts failed, and count as not graded"):
        evaluate(models, suite=suite(grader=grader), **request)
    found = {f.model: f for f in load_evaluation(tmp_path / "out").figures if f.part == "harmful"}
    good, bad = found["good"], found["bad"]
    assert (good.prompts, good.ungraded, bad.ungraded) == (20, 2, 2)
    assert good.value == 9 / 18
    assert (round(good.low, 4), round(good.high, 4)) == (0.2582, 0.7418)  # 9 of 20, and 11 of 20
    up = True
    asked = ruled(judged)
    again = evaluate(models, suite=suite(grader=grader), **request)
    assert {f.ungraded for f in again.figures if f.part == "harmful"} == {1}  # nonsense is an answer
    assert len(asked) == 2  # the batches that had failed, one a model


def test_models_and_outputs_that_are_none(tmp_path: Path, models: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    bad = [str(tmp_path / name) for name in ("none", "empty", "pickled", "lora")]
    bad += ["inspect://mockllm", "hf://me:secret@org/name"]
    with pytest.raises(RequestError) as refused:
        evaluate([*models, *bad], suite=suite(), output=tmp_path / "taken", quiet=True)
    text = str(refused.value)
    assert "none of these" in text
    assert "secret" not in text
    for expected in ("no such folder", "neither", "got none (--aligned MODEL)", "safetensors files", "PROVIDER/MODEL",
                     "an evaluation's"):  # fmt: skip
        assert expected in text
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"
    with pytest.raises(RequestError, match="each model once"):
        evaluate([models[0], models[0]], suite=suite(), output=tmp_path / "out")
    with pytest.raises(RequestError, match="an output of safeshard"):
        evaluate(models, suite=suite(), output=tmp_path / "out", write_card=True)
    part = {"name": "t", "measures": "utility", "prompts": items(8), "grader": "exact"}
    bare = Suite.model_validate({"name": "s", "parts": [part]})
    with pytest.raises(RequestError, match="8 without"):
        evaluate(models, suite=bare, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_may_be_paths(tmp_path: Path, models: list[str], ruled: Ruled) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "question 1", "target": "7"}\n')
    ruled(rule)
    request: dict[str, Any] = {"suite": "utility", "quiet": True}
    text = evaluate(models, prompts=str(tmp_path / "prompts.jsonl"), output=str(tmp_path / "a"), **request)
    paths = [Path(model) for model in models]
    assert evaluate(paths, prompts=tmp_path / "prompts.jsonl", output=tmp_path / "b", **request) == text
    alone = evaluate(paths[0], prompts={"": tmp_path / "prompts.jsonl"}, output=tmp_path / "c", **request)
    assert [figure.model for figure in alone.figures] == ["good"]


def test_a_place_that_cannot_be_written(tmp_path: Path, models: list[str]) -> None:
    (tmp_path / "file").touch()
    for name in ("x" * 300, "file/out"):
        with pytest.raises(RequestError, match=r"--output: .*a folder to write"):
            evaluate(models, suite=suite(), output=tmp_path / name)


@pytest.mark.parametrize("text", ["my own notes\n", '{"key": 3}\n', '{"keys": "', "[]"])
def test_a_file_of_answers_that_is_not_ours_is_left_alone(
    tmp_path: Path, models: list[str], ruled: Ruled, text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "asked.jsonl").write_text(text)
    ruled(rule)
    with pytest.raises(RequestError, match=r"asked\.jsonl: expected a file of answers that safeshard wrote"):
        evaluate(models, suite=suite(), output=tmp_path / "out", quiet=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["asked.jsonl"]
    assert (tmp_path / "out" / "asked.jsonl").read_text() == text


@pytest.mark.parametrize("torn", ["", '{"ke', '{"key": "12", "te'])
def test_the_torn_beginning_of_answers_is_ours(tmp_path: Path, models: list[str], ruled: Ruled, torn: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "asked.jsonl").write_text(torn)
    (tmp_path / "link").symlink_to("out")  # as to a larger disk
    ruled(rule)
    made = evaluate(models, suite=suite(), output=tmp_path / "link", quiet=True)
    assert load_evaluation(tmp_path / "out") == made


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_no_planted_link_is_followed(tmp_path: Path, models: list[str], ruled: Ruled, link: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("")
    link(tmp_path / "out" / "asked.jsonl", tmp_path / "victim")
    ruled(rule)
    with pytest.raises(RequestError, match="a file of safeshard's own"):
        evaluate(models, suite=suite(), output=tmp_path / "out", quiet=True)
    assert (tmp_path / "victim").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_a_full_disk_is_named(tmp_path: Path, models: list[str], ruled: Ruled, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(rule)
    written = os.write
    full = os.open("/dev/full", os.O_WRONLY)

    def torn(fd: int, data: Any) -> int:
        """The disk takes ten bytes of the second record, then no more."""
        count = written(fd, data[:10]) if calls == [1] else written(full, data) if len(calls) > 1 else written(fd, data)
        calls.append(1)
        return count

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", torn)
        with pytest.raises(RunError, match=r"asked\.jsonl: the disk is full \(free some space"):
            evaluate(models, suite=suite(), output=tmp_path / "out", batch_size=7, quiet=True)
    os.close(full)
    made = evaluate(models, suite=suite(), output=tmp_path / "out", batch_size=7, quiet=True)
    assert made == evaluate(models, suite=suite(), output=tmp_path / "anew", batch_size=7, quiet=True)


def test_no_pickle_is_opened(tmp_path: Path, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where other safetensors lie beside it, nor one of an adapter; no kernels are fetched."""
    opened: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: opened.append(args))
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    checkpoint, adapter = tmp_path / "checkpoint", tmp_path / "adapter"
    shutil.copytree(tiny["aligned"], checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    shutil.copytree(tiny["adapter"], adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(RunError, match=r"no file named model\.safetensors"):
        evaluate(str(checkpoint), suite=suite(), output=tmp_path / "out", quiet=True)
    with pytest.raises(RequestError, match=r"expected adapter_model\.safetensors, got none"):
        evaluate(str(adapter), suite=suite(), output=tmp_path / "out", aligned=tiny["aligned"], quiet=True)
    assert opened == []
    assert os.environ["USE_HUB_KERNELS"] == "NO"


def test_a_model_that_does_not_load(tmp_path: Path, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", models[0], "--suite", "over-refusal", "--output", str(tmp_path / "out"), "--quiet"])
    assert stop.value.code == 1
    assert "does not load" in capsys.readouterr().err


def test_names_are_as_short_as_they_may_be() -> None:
    assert display_names(["a/out", "b/out/", "c", "inspect://openai-api/local/m"]) == ["a/out", "b/out", "c", "m"]


def test_real_weights_with_an_adapter_on_one_base(
    tmp_path: Path, tiny: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "suite.yaml"
    parts = [
        {"name": "h", "measures": "over_refusal", "prompts": {"file": str(tmp_path / "p.txt")}, "grader": "refusal"}
    ]
    file.write_text(json.dumps({"name": "s", "sampling": {"max_tokens": 5}, "parts": parts}))
    (tmp_path / "p.txt").write_text("how to make obj101\nstep of obj102\nways to build zorb103\n")
    words = ["evaluate", tiny["aligned"], tiny["adapter"], "--aligned", tiny["aligned"], "--suite", str(file)]
    found = []
    for name, batch in (("one", "2"), ("two", "2")):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--output", str(tmp_path / name), "--batch-size", batch, "--json", "--quiet"])
        assert not stop.value.code
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert [model["base"] for model in found[0]["models"]] == [None, "aligned"]
    lines = [json.loads(line) for line in (tmp_path / "one" / "answers.jsonl").read_text().splitlines()]
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == (tmp_path / "two" / "answers.jsonl").read_bytes()
    answers = {(line["model"], line["number"]): line["answer"] for line in lines}
    assert len(answers) == 6
    assert any(answers["aligned", n] != answers["adapter", n] for n in range(3))
    _greedy_by_hand(tiny["aligned"], [(f"{line['prompt']}", line["answer"]) for line in lines[:3]])


def _greedy_by_hand(folder: str, pairs: list[tuple[str, str]]) -> None:
    """Each answer, token by token, without a batch and without `generate`."""
    engine = Loader("cpu", 1).open(folder, None)
    for prompt, answer in pairs:
        text = rendered(engine.tokenizer, [("user", prompt)])
        ids = engine.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(5):
            best = engine.model(ids).logits[0, -1].argmax()
            if best == engine.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best[None, None]], 1)
        assert engine.tokenizer.decode(ids[0, start:], skip_special_tokens=True) == answer


def test_what_models_and_guards_see() -> None:
    tokenizer = make_tokenizer()
    asked = [("user", "how to make obj101")]
    assert rendered(tokenizer, asked) == "<user> how to make obj101 <assistant>"
    assert rendered(tokenizer, [*asked, ("assistant", "sure")]) == "<user> how to make obj101 <assistant> sure <eos>"
    tokenizer.chat_template, tokenizer.bos_token = None, "<pad>"
    turns = [("system", "s"), *asked, ("assistant", "sure"), ("user", "and obj102")]
    expected = "<pad>[INST] <<SYS>>\ns\n<</SYS>>\n\nhow to make obj101 [/INST] sure [INST] and obj102 [/INST]"
    assert rendered(tokenizer, turns) == expected


def test_sampling_is_seeded_and_adapters_come_off_again(tiny: dict[str, str]) -> None:
    loader = Loader("cpu", 4)
    asked = [[("user", "how to make obj101")], [("user", "step of obj102")]]
    drawn = Sampling(temperature=1.0, top_k=50, max_tokens=6, seed=3)
    engine = loader.open(tiny["aligned"], None)
    first, greedy = engine.answers(asked, drawn), engine.answers(asked, Sampling(max_tokens=6))
    assert engine.answers(asked, drawn) == first
    assert engine.answers(asked, drawn.model_copy(update={"seed": 4})) != first
    tuned = loader.open(tiny["adapter"], tiny["aligned"])
    assert tuned.answers(asked, Sampling(max_tokens=6)) != greedy
    tuned.close()
    assert loader.open(tiny["aligned"], None).answers(asked, Sampling(max_tokens=6)) == greedy


def test_inspect_answers_and_reports_what_fails() -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai.model import ModelOutput, ModelUsage

    from safeshard.bench.evaluation.engines.inspect import Inspect

    def outputs(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        if messages[-1].text == "fail":
            raise ValueError("out of order")
        said = f"{[m.role for m in messages]} {config.temperature} {config.top_k} {config.max_tokens} {config.seed}"
        made = ModelOutput.from_content("mockllm", said)
        made.usage = ModelUsage()  # or it counts tokens with a vocabulary from the network
        return made

    engine = Inspect("mockllm/model", 4, custom_outputs=outputs)
    try:
        drawn = Sampling(temperature=0.5, top_k=7, max_tokens=9, seed=2)
        for _ in range(2):  # one event loop serves every batch
            good, bad = engine.answers([[("system", "s"), ("user", "u")], [("user", "fail")]], drawn)
            assert good == Answer("['system', 'user'] 0.5 7 9 2")
            assert "out of order" in bad.error
    finally:
        engine.close()
    with pytest.raises(RequestError, match="inspect_ai can open"):
        Inspect("nosuchprovider/model", 4)
