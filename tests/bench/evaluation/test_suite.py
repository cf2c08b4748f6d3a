"""Suites and prompt files are read strictly, and what is wrong with them is said, all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeshard.bench.evaluation.prompts import Prompt, Prompts, read_prompts
from safeshard.bench.evaluation.suite import known_suites, read_suite
from safeshard.manifests.errors import RequestError

HARMLESS = {"name": "h", "measures": "over_refusal", "prompts": {"built_in": "borderline"}, "grader": "refusal"}
HARMFUL = {"name": "x", "measures": "attack_success", "prompts": {"built_in": "refusals"}, "grader": "refusal"}


def test_built_in_suites(tmp_path: Path) -> None:
    assert known_suites() == ["guard", "judge", "keywords", "over-refusal", "published-safedelta", "utility"]
    given = tmp_path / "given.jsonl"
    for name in known_suites():
        open_parts = {"published-safedelta": {"harmful": given}, "utility": {"": given}}.get(name, {})
        suite = read_suite(name, open_parts)
        assert suite.name == name
        assert any(part.measures != "attack_success" for part in suite.parts)


def test_the_published_suite_is_the_published_one(tmp_path: Path) -> None:
    part = read_suite("published-safedelta", {"harmful": tmp_path}).parts[0]
    suite = read_suite("published-safedelta", {"": tmp_path})
    assert suite.sampling_of(part).label == "T 1, top_k 50, top_p 1, seed 42"
    assert suite.sampling_of(part).max_tokens == 512
    assert part.grader is not None
    assert part.grader.label == "29 published strings"


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ([], "a mapping with name and parts"),
        ({"name": "s"}, "parts"),
        ({"name": "s", "parts": []}, "parts"),
        ({"name": "s", "parts": [HARMLESS], "strange": 1}, "strange"),
        ({"name": "s", "parts": [HARMFUL | {"grader": "vibes"}, HARMLESS]}, "one of keywords, refusal, words"),
        ({"name": "s", "parts": [HARMFUL | {"grader": {"name": "judge"}}, HARMLESS]}, "judge.model"),
        ({"name": "s", "parts": [HARMFUL | {"grader": "exact"}, HARMLESS]}, "tells utility, not attack_success"),
        ({"name": "s", "parts": [HARMFUL]}, "without a control"),
        ({"name": "s", "parts": [HARMLESS, HARMLESS]}, "names of their own"),
        ({"name": "s", "parts": [HARMLESS | {"prompts": {}}]}, "one of file, hub, built_in, items"),
        ({"name": "s", "parts": [HARMLESS | {"prompts": {"items": [{"prompt": ""}]}}]}, "items.0.prompt"),
        ({"name": "s", "parts": [HARMLESS | {"sampling": {"temperature": -1}}]}, "temperature"),
        ({"name": "s", "parts": [{k: v for k, v in HARMLESS.items() if k != "grader"}]}, "needs a grader"),
        ({"name": "s", "parts": [HARMLESS | {"harness": {"tasks": ["x"]}}]}, "either prompts or harness"),
        ({"name": "../s", "parts": [HARMLESS]}, "name: expected a name of at most 64 letters"),
        ({"name": "s", "parts": [HARMLESS | {"sampling": {"temperature": 1e-300}}]}, "0, which is greedy, or at least"),
        ({"name": "s", "parts": [HARMLESS | {"grader": {"name": "keywords", "strings": []}}]}, "at least 1 of them"),
    ],
)
def test_bad_suites(tmp_path: Path, suite: object, expected: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps(suite))
    with pytest.raises(RequestError) as refused:
        read_suite(file)
    assert expected in str(refused.value)


def test_a_suite_may_do_without_a_control_if_it_says_so(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps({"name": "s", "parts": [HARMFUL], "control": False}))
    assert not read_suite(str(file)).control


def test_all_offences_of_a_suite_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    parts = [HARMFUL | {"grader": "vibes"}, HARMLESS | {"measures": "beauty"}, HARMLESS | {"sampling": {"seed": -1}}]
    file.write_text(json.dumps({"name": "s", "parts": parts}))
    with pytest.raises(RequestError) as refused:
        read_suite(file)
    assert len(refused.value.offences) == 3


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("nosuch", {}, "one of guard"),
        ("utility", {}, "--prompts task=FILE"),
        ("utility", {"tusk": "f"}, "leaves its prompts to you: task"),
        ("keywords", {"": "f"}, "leaves prompts to you"),
    ],
)
def test_given_prompts(name: str, given: dict[str, str], expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        read_suite(name, given)


def test_a_grader_model_is_for_suites_that_ask_one() -> None:
    [harmful, _] = read_suite("guard", grader_model="org/other").parts
    assert harmful.grader is not None
    assert harmful.grader.label == "guard other"
    with pytest.raises(RequestError, match="ask a model"):
        read_suite("keywords", grader_model="org/other")


def _read(file: Path, **options: object) -> list[Prompt]:
    return read_prompts(Prompts(file=file, **options), "here")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "options", "asked", "target"),
    [
        ("a.jsonl", '{"prompt": "Q?", "target": "A"}', {}, "Q?", "A"),
        ("a.jsonl", '\ufeff{"instruction": "Q?", "input": "I", "output": "A"}\n\n', {}, "Q?\n\nI", "A"),
        ("a.json", '[{"goal": "Q?"}]', {}, "Q?", ""),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]}', {},
         "Q?", "A"),
        ("a.jsonl", '{"question": "Q?", "choices": ["x", "y"], "answer": 1}', {},
         "Q?\nA. x\nB. y\nAnswer with the letter alone.", "B"),
        ("a.jsonl", '{"prompt": "Q?", "target": {"a": 1}}', {}, "Q?", '{"a": 1}'),
        ("a.jsonl", '{"dialogue": "D", "summary": "S"}', {"template": "Summarize:\n{}"}, "Summarize:\nD", "S"),
        ("a.jsonl", '{"wish": "Q?", "prompt": "no", "want": "A"}', {"column": "wish", "target": "want"}, "Q?", "A"),
        ("a.csv", "Behavior,Category\nQ?,x\n", {}, "Q?", ""),
        ("a.csv", '"Q, or not?"\n', {}, "Q, or not?", ""),
        ("a.txt", "Q?\n\n", {}, "Q?", ""),
    ],
)  # fmt: skip
def test_prompt_files(
    tmp_path: Path, name: str, text: str, options: dict[str, object], asked: str, target: str
) -> None:
    (tmp_path / name).write_text(text)
    [found] = _read(tmp_path / name, **options)
    assert (found.text, found.target) == (asked, target)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", "", "at least one prompt"), ("a.txt", "\n \n", "at least one prompt"), ("a.csv", "", "at least"),
        ("a.jsonl", "{", "line 1"), ("a.jsonl", '"x"', "named fields"), ("a.jsonl", '{"prompt": " "}', "not empty"),
        ("a.jsonl", '{"prompt": 3}', "not empty"), ("a.jsonl", '{"messages": []}', "role and content"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "A"}]}', "end with a question"),
        ("a.jsonl", '{"prompt": "Q", "choices": ["x"]}', "choices"),
        ("a.jsonl", '{"prompt": "Q", "choices": ["x", "y"], "answer": 2}', "among the choices"),
        ("a.jsonl", "[" * 100_000, "valid JSONL"), ("a.jsonl", '{"prompt": "\\ud800"}', "without lone surrogates"),
        ("a.jsonl", '{"prompt": "Q", "target": {"\\udfff": 1}}', "without lone surrogates"),
        ("a.json", "[" + "[]," * 3_000_000 + "[]]", "more than 3000000 values"),
    ],
)  # fmt: skip
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=expected):
        _read(tmp_path / name)


def test_every_bad_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": ""}\n{"prompt": "Q?"}\n{}\n')
    with pytest.raises(RequestError) as refused:
        _read(tmp_path / "a.jsonl")
    assert [offence.where.rpartition(":")[2] for offence in refused.value.offences] == ["1", "3"]


def test_of_many_bad_records_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * 50_000 + '{"prompt": "Q?"}\n')
    with pytest.raises(RequestError) as refused:
        _read(tmp_path / "a.jsonl")
    assert len(refused.value.offences) == 11
    assert "50000 of 50001 records" in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        _read(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="not a regular file"):
        _read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(RequestError, match="UTF-8"):
        _read(tmp_path / "latin.jsonl")


def test_limit_and_system_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1\n2\n3\n")
    found = read_prompts(Prompts(file=tmp_path / "a.txt", limit=2), "here", "be good")
    assert [p.messages for p in found] == [(("system", "be good"), ("user", n)) for n in "12"]


class _DataSets:
    """Stands in for the package `datasets`."""

    @staticmethod
    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        if name != "org/set":
            raise ConnectionError("offline, and not in the cache")
        return [{"Behavior": f"{subset} {split} {n}", "Category": "x"} for n in range(3)]


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeshard.bench.evaluation.prompts.require", lambda *_: _DataSets)
    source = Prompts(hub="org/set", subset="standard", split="test", limit=2)  # type: ignore[call-arg]
    assert [p.text for p in read_prompts(source, "here")] == ["standard test 0", "standard test 1"]
    assert source.source == "org/set/standard test"
    with pytest.raises(RequestError, match=r"offline, and not in the cache .*HF_HUB_OFFLINE"):
        read_prompts(Prompts(hub="org/other"), "here")  # type: ignore[call-arg]
