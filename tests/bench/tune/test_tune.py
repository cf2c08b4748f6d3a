"""A tuning from end to end on tiny models whose answers follow a rule that the factor decides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safeshard import streamer
from safeshard.bench.evaluation.engines.base import Answer, InProcess
from safeshard.bench.evaluation.engines.open import Engines
from safeshard.bench.evaluation.prompts import Message, Prompt
from safeshard.bench.tune import tune
from safeshard.bench.tune.sweep import split
from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.schema import load
from safeshard.streamer.cli.app import main


@pytest.fixture
def sweep(tmp_path: Path, tiny: dict[str, str]) -> dict[str, Any]:
    """A sweep of two methods on the tiny adapter."""
    suite = {
        "name": "s", "sampling": {"max_tokens": 4},
        "parts": [
            {"name": "harmful", "measures": "attack_success", "grader": "refusal",
             "prompts": {"items": [{"prompt": f"harm {n}"} for n in range(40)]}},
            {"name": "task", "measures": "utility", "grader": "exact",
             "prompts": {"items": [{"prompt": f"task {n}", "target": "done"} for n in range(40)]}},
        ],
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    return {
        "aligned": tiny["aligned"], "adapter": tiny["adapter"], "suite": str(tmp_path / "suite.yaml"),
        "settings": [
            {"method": "scale", "matrix": {"factor": [0.25, 0.5, 0.75]}},
            {"method": "scale", "label": "other", "matrix": {"factor": [0.3, 0.6]}},
        ],
        "output": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models answer by the factor in their manifest; `other` keeps more of the task. Returns the folders asked."""
    opened: list[str] = []

    def strength(model: str) -> tuple[float, float]:
        """Shares of attacks that succeed, and of tasks that are solved."""
        if not (Path(model) / "manifest.json").is_file():
            return (1.0, 1.0) if "adapter" in model else (0.0, 0.0)
        factor = float(load(Path(model)).method.options["factor"])
        return (0.0 if factor < 0.55 else 1.0), (0.8 if factor in (0.3, 0.6) else factor)

    def open_model(engines: Engines, model: str, aligned: str | None) -> InProcess:
        opened.append(Path(model).name)
        attacked, solved = strength(model)

        def answer(conversations: Sequence[Sequence[Message]], _: Any) -> list[str]:
            said = []
            for turns in conversations:
                kind, number = turns[-1][1].split()
                share = int(number) / 40
                said.append(("ok" if share < attacked else "sorry") if kind == "harm" else
                            "done" if share < solved else "no")  # fmt: skip
            return said

        return InProcess(answer, engines.batch)

    monkeypatch.setattr(Engines, "open", open_model)
    return opened


def write(tmp_path: Path, sweep: dict[str, Any]) -> Path:
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    return tmp_path / "sweep.yaml"


def test_the_best_safe_setting_is_written(
    tmp_path: Path, sweep: dict[str, Any], answering: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", str(write(tmp_path, sweep))])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "Chosen: other, factor 0.3, with 0.0 % attack success" in printed
    assert "as the rule demands" in printed
    out = tmp_path / "out"
    assert streamer.verify(out / "defended") == []
    assert load(out / "defended").method.options["factor"] == 0.3
    assert (out / "tradeoff.png").stat().st_size > 5000
    result = json.loads((out / "tune.json").read_text())
    assert result["choice"]["scale_beaten"]
    assert [(p["method"], p["setting"]) for p in result["points"]] == [
        ("aligned", ""), ("fine-tuned", ""), ("scale", "factor 0.25"), ("scale", "factor 0.5"),
        ("scale", "factor 0.75"),
        ("other", "factor 0.3"), ("other", "factor 0.6"),
    ]  # fmt: skip
    assert {f["model"] for f in result["test"]["figures"]} == {"aligned", "fine-tuned", "defended", "scale"}
    asked = {json.loads(line)["prompt"] for line in (out / "validation-1" / "answers.jsonl").read_text().splitlines()}
    confirmed = {json.loads(line)["prompt"] for line in (out / "test" / "answers.jsonl").read_text().splitlines()}
    assert asked.isdisjoint(confirmed)
    assert len(asked) == len(confirmed) == 40
    assert streamer.batch(out / "jobs.yaml", quiet=True)  # the record of what was run, which is finished
    before = len(answering)
    again = tune(write(tmp_path, sweep), quiet=True)
    assert json.loads(again.to_json()) == result
    assert len(answering) == before


def test_nothing_beats_scale(tmp_path: Path, sweep: dict[str, Any], answering: list[str]) -> None:
    sweep["settings"][1]["matrix"]["factor"] = [0.4]
    made = tune(write(tmp_path, sweep), quiet=True)
    assert not made.choice.scale_beaten
    assert any("Nothing beats `scale` here" in sentence for sentence in made.sentences())
    assert load(tmp_path / "out" / "defended").method.options["factor"] == 0.5


def test_checkpoints_that_do_not_fit_at_once(
    tmp_path: Path, sweep: dict[str, Any], answering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(write(tmp_path, sweep), quiet=True)
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in (tmp_path / "out" / "settings").iterdir()]

    class Usage:
        free = int(2.5 * max(sizes))

    monkeypatch.setattr("safeshard.bench.tune.run.shutil.disk_usage", lambda _: Usage)
    parts = tune(write(tmp_path, sweep | {"output": str(tmp_path / "parts")}), quiet=True)
    assert parts.choice == whole.choice
    assert not list((tmp_path / "parts" / "settings").iterdir())
    assert len(list((tmp_path / "parts").glob("validation-[0-9]"))) == 3
    assert streamer.verify(tmp_path / "parts" / "defended") == []


def test_an_interrupted_tuning_goes_on(
    tmp_path: Path, sweep: dict[str, Any], answering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, sweep)
    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "answers", lambda engine, asked, _: [Answer(error="down")] * len(asked))
        with pytest.raises(RunError, match="answers failed"):
            tune(file, quiet=True)
    assert not (tmp_path / "out" / "defended").exists()
    assert tune(file, quiet=True).choice.chosen.setting == "factor 0.3"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"settings": []}, "give settings"), ({"settings": [{"method": "magic"}]}, "magic"),
        ({"settings": [{"method": "scale", "matrix": {"factor": [2.0, "x"]}}]}, "factor"),
        ({"settings": [{"method": "scale", "factor": 0.5, "aligned": "x"}]}, "aligned: expected an option of the"),
        ({"settings": [{"method": "scale", "matrix": {"output": ["x"]}}]}, "output: expected an option of the"),
        ({"settings": [{"method": "scale", "factor": 0.5, "label": "x" * 300}]}, "File name too long"),
        ({"settings": [{"method": "scale", "factor": 0.5}, {"method": "scale", "factor": 0.5}]}, "each setting once"),
        ({"validation": 1.5}, "a share between"), ({"validation": "x"}, "validation: expected a share between"),
        ({"validation": float("nan")}, "validation: expected a share between"), ({"output": "x" * 300}, "a folder to"),
        ({"validation": 0.001}, "enough for validation and test"),
        ({"adapter": None}, "either adapter or finetuned"), ({"suite": "over-refusal"}, "measures attack_success"),
        ({"aligned": "./nowhere"}, "no such folder"), ({"colour": "red"}, "colour"), ({"margin": -1}, "margin"),
    ],
)  # fmt: skip
def test_bad_sweeps(tmp_path: Path, sweep: dict[str, Any], change: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        tune(write(tmp_path, sweep | change), quiet=True)
    assert expected in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_typo_is_said_once_under_the_number_that_the_user_wrote(tmp_path: Path, sweep: dict[str, Any]) -> None:
    sweep["settings"] = [
        {"method": "safelora", "matrix": {"threshold": [0.1, 0.2]}, "unalignde": "x", "unaligned": sweep["aligned"]},
        {"method": "safelora", "treshold": 0.3, "unaligned": sweep["aligned"]},
    ]  # fmt: skip
    with pytest.raises(RequestError) as refused:
        tune(write(tmp_path, sweep), quiet=True)
    message = str(refused.value)
    assert message.count("unalignde") == 1
    assert "settings: entry 1: unalignde" in message
    assert "settings: entry 2: treshold" in message
    assert "job" not in message


def test_a_suite_that_cannot_tell_says_so(tmp_path: Path, sweep: dict[str, Any], answering: list[str]) -> None:
    apart = tune(write(tmp_path, sweep), quiet=True)
    assert apart.told_apart() == {"attack_success": True, "utility": True}
    assert "cannot tell" not in apart.text()
    sweep["settings"] = [{"method": "scale", "matrix": {"factor": [0.7, 0.75]}}]
    alike = tune(write(tmp_path, sweep | {"output": str(tmp_path / "alike")}), quiet=True)
    assert alike.told_apart() == {"attack_success": False, "utility": False}
    assert "cannot tell the settings apart" in alike.text()
    assert "cannot tell the settings apart" in (tmp_path / "alike" / "README.md").read_text()


def test_folders_of_others_are_left_alone(tmp_path: Path, sweep: dict[str, Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(RequestError, match="a tuning's"):
        tune(write(tmp_path, sweep), quiet=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "jobs",
    [
        "# my own jobs\njobs: []\n", '{"jobs": []}', '{"jobs": [{"method": "scale", "output": "elsewhere"}]}', "[", "3",
        '{"jobs": [3]}', '{"jobs": [{"output": 3}]}',
    ],
)  # fmt: skip
def test_a_jobs_file_of_others_is_not_replaced(tmp_path: Path, sweep: dict[str, Any], jobs: str) -> None:
    """Its name alone makes no tuning of a folder: its README.md would be replaced as well."""
    (tmp_path / "out").mkdir()
    for name, text in {"jobs.yaml": jobs, "README.md": "precious"}.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(RequestError, match="a tuning's"):
        tune(write(tmp_path, sweep), quiet=True)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "jobs.yaml": jobs, "README.md": "precious"
    }  # fmt: skip


def test_the_split_does_not_depend_on_the_order() -> None:
    prompts = [Prompt((("user", f"q{n}"),)) for n in range(20)]
    validation, test = split({"p": prompts}, 0.3)
    assert len(validation["p"]) == 6
    assert sorted(validation["p"] + test["p"], key=prompts.index) == prompts
    assert split({"p": prompts[::-1]}, 0.3)[0] == validation
