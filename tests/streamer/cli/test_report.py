"""`report` on outputs of all methods, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from safeshard.manifests import RequestError, load
from safeshard.manifests.evaluation import EvaluatedModel, Evaluation, Figure
from safeshard.streamer import report, safelora, safemerge, scale, verify
from safeshard.streamer.cli.app import main


@pytest.fixture
def outputs(world: Any) -> list[Path]:
    """Outputs of SafeMERGE, SafeLoRA by number and by threshold, and the baseline."""
    paths = world.trio()
    common = {"aligned": paths["aligned"], "adapter": paths["adapter"], "quiet": True}
    gated = common | {"unaligned": paths["unaligned"]}
    safemerge(**gated, safe_adapter=paths["safe_adapter"], output=world.root / "merged")
    safelora(**gated, num_layers=3, output=world.root / "numbered")
    safelora(**gated, threshold=0.4, output=world.root / "projected")
    scale(**common, factor=0.5, output=world.root / "scaled")
    return [world.root / name for name in ("merged", "numbered", "projected", "scaled")]


def cells(page: Path, name: str) -> list[str]:
    """The texts of the cells that name a module in their title."""
    found = re.findall(r'<td class="[^"]*" title="([^"]*)">([^<]*)</td>', page.read_text(encoding="utf-8"))
    return [unescape(text) for title, text in found if unescape(title).startswith(f"{name}:")]


def test_every_method_has_its_page(outputs: list[Path]) -> None:
    for output in outputs:
        page = report(output)
        assert page == output.with_name(f"{output.name}.report.html")
        for module in json.loads((output / "manifest.json").read_text())["modules"]:
            [text] = cells(page, module["name"])
            assert text.startswith(f"{module['cosine']:.3f}" if "cosine" in module else "◇")
        assert verify(output) == []


def test_safe_delta(llama: Any) -> None:
    llama.run("out")
    page = report(llama.root / "out")
    for module in json.loads((llama.root / "out/manifest.json").read_text())["modules"]:
        [text] = cells(page, module["name"])
        assert text.startswith(f"{module['selected_fraction']:.1%}")


def test_one_page_on_several(outputs: list[Path], world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.root)
    assert report([output.name for output in outputs]) == Path("report.html")
    text = Path("report.html").read_text(encoding="utf-8")
    links = [f'<a href="#output-{i}" rel="noreferrer">{i} {o.name}</a>' for i, o in enumerate(outputs, 1)]
    assert [text.count(link) for link in links] == [1] * 4
    assert [p.name for p in world.root.iterdir() if p.name.startswith(".")] == []


def evaluation(folder: Path, outputs: list[Path]) -> Path:
    """An evaluation of outputs: attack success and utility, a tenth more each."""
    facts = {"part": "p", "prompts": 20, "ungraded": 0, "incoherent": 0.0, "source": "f", "grader": "g",
             "sampling": "greedy", "max_tokens": 9, "low": 0.0, "high": 1.0}  # fmt: skip
    models = [EvaluatedModel(name=o.name, source=o.name, manifest_blake3=load(o).blake3) for o in outputs]
    figures = [
        Figure.model_validate(facts | {"model": model.name, "measure": measure, "value": n / 10 + shift})
        for n, model in enumerate(models) for measure, shift in (("attack_success", 0.1), ("utility", 0.2))
    ]  # fmt: skip
    folder.mkdir()
    made = Evaluation(suite="s", engine="e", versions={}, models=tuple(models), figures=tuple(figures))
    (folder / "evaluation.json").write_text(made.to_json())
    return folder


def test_a_folder_of_outputs_with_their_evaluation(outputs: list[Path], world: Any) -> None:
    folder = world.root / "batch"
    for output in outputs[:3]:
        shutil.copytree(output, folder / "deep" / output.name)
    shutil.copytree(outputs[3], folder / ".hidden")
    shutil.copytree(outputs[3], folder / "unfinished.partial")
    (folder / "link").symlink_to(outputs[3])
    page = report(folder, evaluation=evaluation(world.root / "results", outputs[:2]))
    assert page == world.root / "batch.report.html"
    text = page.read_text(encoding="utf-8")
    assert text.count('<section class="output"') == 3
    assert text.count("10.0 <small>0.0 to 100.0</small>") == 1
    assert "1 merged" not in text  # titles are paths as they were given
    titles = re.findall(r"<title>([^<]*): ([\d.]+) % attack success, ([\d.]+) % utility</title>", text)
    assert [(Path(t).name, a, u) for t, a, u in titles] == [("merged", "10.0", "20.0"), ("numbered", "20.0", "30.0")]


def test_an_evaluation_of_none_of_the_outputs_is_refused(outputs: list[Path], world: Any) -> None:
    results = evaluation(world.root / "results", outputs[:1])
    with pytest.raises(
        RequestError, match=r"--evaluation: expected figures of one of the outputs, got figures of merged"
    ):
        report(outputs[1], evaluation=[results])
    with pytest.raises(RequestError) as refused:
        report([outputs[1], world.root / "missing"], evaluation=[world.root / "none"], file=world.root / "page.html")
    assert {Path(o.where).name for o in refused.value.offences} == {"missing", "none"}
    assert not list(world.root.glob("*.html"))


def test_an_existing_page_is_replaced_only_on_demand(outputs: list[Path]) -> None:
    page = outputs[0].with_name("merged.report.html")
    page.write_text("mine")
    with pytest.raises(RequestError, match=r"merged\.report\.html.*exists already.*--overwrite"):
        report(outputs[0])
    assert page.read_text() == "mine"
    assert report(outputs[0], overwrite=True) == page
    assert page.read_text(encoding="utf-8") == report(outputs[0], file=page.with_name("b.html")).read_text("utf-8")


@pytest.mark.parametrize(
    ("file", "got"),
    [
        ("report.txt", "expected a .html file, got .txt"),
        ("merged/other.html", "its manifest does not name"),
        ("link/deep/other.html", "its manifest does not name"),
        ("folder.html", "is a folder"),
        ("merged/manifest.json/x.html", "is a file"),
        ("n" * 300 + ".html", "too long"),
    ],
)
def test_places_it_refuses(outputs: list[Path], world: Any, file: str, got: str) -> None:
    (world.root / "folder.html").mkdir()
    (world.root / "link").symlink_to(world.root / "merged")
    before = sorted(world.root.rglob("*"))
    with pytest.raises(RequestError, match=got):
        report(outputs[0], file=world.root / file, overwrite=True)
    assert sorted(world.root.rglob("*")) == before


def test_the_place_that_verify_leaves_out_is_allowed(outputs: list[Path]) -> None:
    assert report(outputs[0], file=outputs[0] / "report.html").exists()
    assert verify(outputs[0]) == []


def test_all_that_are_no_outputs_are_named(outputs: list[Path], world: Any) -> None:
    (world.root / "broken").mkdir()
    (world.root / "broken/manifest.json").write_text("{}")
    with pytest.raises(RequestError) as refused:
        report([world.root / "missing", outputs[0], world.root / "broken"], file=world.root / "page.html")
    places = {world.root / "missing", world.root / "broken/manifest.json"}
    assert {Path(offence.where) for offence in refused.value.offences} == places
    assert not (world.root / "page.html").exists()
    with pytest.raises(RequestError, match="an output, got none"):
        report([])


def test_the_command(capsys: pytest.CaptureFixture[str], outputs: list[Path], world: Any) -> None:
    page = world.root / "new/page.html"
    command = ["report", *map(str, outputs[:2]), "--output", str(page), "--json"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"report": str(page)}  # and nothing else
    assert f"report: {page}" in printed.err
    assert page.exists()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--overwrite"])
    assert not stop.value.code
