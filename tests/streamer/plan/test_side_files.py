"""The small files beside the weights: by rule, the fine-tuned folder's first; what stays behind is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import api, scale
from safeshard.streamer.plan.written import side_files
from safeshard.streamer.write.writer import Writer

SMALL = [
    "tekken.json", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tokenizer.model.v3", "params.json",
    "video_preprocessor_config.json", "tokenizer.json", "merges.txt", "SYSTEM_PROMPT.txt", "anything.yaml", "sign.png",
]  # fmt: skip
LICENCES = ["LICENSE", "NOTICE", "USE_POLICY.md", "LICENSE.txt", "Llama-LICENCE", "acceptable_use_policy.pdf"]
CODE = ["modeling_x.py", "configuration_x.py", "run.sh", "handler.ipynb", "kernel.so", "LICENSE.py"]
PICKLES = ["optimizer.pt", "training_args.bin", "rng_state_0.pth", "scheduler.ckpt", "data.pkl", "pytorch_model.bin"]
OTHER = ["model.gguf", "model.onnx", "pytorch_model.bin.index.json", ".env", "trainer_state.json", "odd\nname.txt"]


@pytest.fixture
def job(world: Any) -> dict[str, Any]:
    paths = world.trio()
    tuned = world.checkpoint("tuned", {n: t + 0.1 for n, t in world.llama(2, seed=1).items()})
    return {"aligned": paths["aligned"], "finetuned": tuned, "output": world.root / "out", "factor": 0.5, "quiet": True}


def put(folder: Path, *names: str, text: str = "") -> None:
    for name in names:
        (folder / name).write_text(text or f"{folder.name}: {name}")


def left(result: Any) -> dict[str, str]:
    """Why files stayed behind, by name."""
    notes = [f for f in result.manifest.fallbacks if f.done == "left behind"]
    return {name: f.why for f in notes for name in (f.subject or "").split(", ")}


def test_what_is_small_and_no_weight_goes_along(job: dict[str, Any]) -> None:
    """From the fine-tuned folder where it is there, else from the aligned one; the rest is named with its reason."""
    put(job["aligned"], *SMALL, *LICENCES, *CODE, *PICKLES, *OTHER)
    put(job["finetuned"], "tokenizer.json", "anything.yaml", "optimizer.pt")
    result = scale(**job)
    out = job["output"]
    for name in (*SMALL, *LICENCES):
        own = name in ("tokenizer.json", "anything.yaml")
        assert (out / name).read_text() == f"{'tuned' if own else 'aligned'}: {name}"
    expected = dict.fromkeys(CODE, "code") | dict.fromkeys(PICKLES, "pickles") | dict.fromkeys(OTHER[:3], "weights")
    expected |= {".env": "hidden", "trainer_state.json": "training", "odd\nname.txt": "name"}
    why = left(result)
    assert {name: word for name, word in expected.items() if word not in why[name]} == {}
    assert why.keys() == expected.keys()
    assert {path.name for path in out.iterdir()} == {
        *SMALL, *LICENCES, "config.json", "model.safetensors", "README.md", "manifest.json"
    }  # fmt: skip
    assert api.verify(out) == []


def test_auto_map_stays_and_its_code_is_said_to_be_missing(job: dict[str, Any]) -> None:
    for role in ("aligned", "finetuned"):
        config = json.loads((job[role] / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
        (job[role] / "config.json").write_text(json.dumps(config))
    put(job["aligned"], "modeling_x.py")
    result = scale(**job)
    assert "auto_map" in json.loads((job["output"] / "config.json").read_text())
    assert not (job["output"] / "modeling_x.py").exists()
    assert "copy it yourself where `auto_map` needs it" in left(result)["modeling_x.py"]


def test_chat_templates_in_a_folder_are_said_to_be_missing(job: dict[str, Any]) -> None:
    """transformers saves there all but one of several."""
    (job["finetuned"] / "additional_chat_templates").mkdir()
    put(job["finetuned"] / "additional_chat_templates", "tool_use.jinja")
    assert "copy it" in left(scale(**job))["additional_chat_templates"]


def test_an_adapter_takes_its_own_files_and_every_licence(world: Any) -> None:
    given = world.trio()
    put(given["aligned"], "LICENSE", "USE_POLICY.md", "tokenizer.json", "modeling_x.py")
    put(given["adapter"], "LICENSE", "chat_template.jinja", "README.md", "optimizer.pt")
    result = scale(aligned=given["aligned"], adapter=given["adapter"], factor=0.5, output=world.root / "o", quiet=True)
    texts = {path.name: path.read_text() for path in (world.root / "o").iterdir() if path.suffix != ".safetensors"}
    assert {name: text for name, text in texts.items() if ":" in text and not text.startswith(("{", "-"))} == {
        "LICENSE": "adapter: LICENSE", "aligned-LICENSE": "aligned: LICENSE",
        "USE_POLICY.md": "aligned: USE_POLICY.md", "chat_template.jinja": "adapter: chat_template.jinja",
    }  # fmt: skip
    assert left(result).keys() == {"optimizer.pt"}
    assert api.verify(world.root / "o") == []


def test_equal_licences_are_one(job: dict[str, Any]) -> None:
    for role in ("aligned", "finetuned"):
        put(job[role], "LICENSE", text="Apache")
    scale(**job)
    assert not (job["output"] / "aligned-LICENSE").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_template_of_the_fine_tuned_tokenizer_is_not_overridden(job: dict[str, Any], own: bool) -> None:
    """transformers prefers chat_template.jinja to what tokenizer_config.json says."""
    put(job["aligned"], "chat_template.jinja")
    put(job["finetuned"], "tokenizer_config.json", text=json.dumps({"chat_template": "x"} if own else {}))
    result = scale(**job)
    assert (job["output"] / "chat_template.jinja").exists() != own
    assert ("chat_template.jinja" in left(result)) == own


def test_sizes_and_counts_are_bounded(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "SMALL_BYTES", 1000)
    monkeypatch.setattr(side_files, "MAX_SIDE_FILES", 20)
    put(job["aligned"], "large.json", text="x" * 1001)
    put(job["aligned"], *(f"{number:03d}.json" for number in range(30)))
    result = scale(**job)
    why = left(result)
    assert "larger than 1000 bytes" in why["large.json"]
    assert len([name for name in job["output"].iterdir() if name.name[:3].isdigit()]) == 20
    assert "more than 20" in why["020.json"]


def test_a_link_that_leads_outside_stays_behind(job: dict[str, Any], world: Any) -> None:
    (world.root / "secret.txt").write_text("secret")
    (job["aligned"] / "notes.txt").symlink_to(world.root / "secret.txt")
    result = scale(**job)
    assert "outside" in left(result)["notes.txt"]
    (job["aligned"] / "LICENSE").symlink_to(world.root / "secret.txt")
    with pytest.raises(RequestError, match="inside the folder"):
        scale(**job, overwrite=True)


def test_side_files_are_part_of_the_request(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished output with others is not gone on with, and one that changes underway is noticed."""
    put(job["aligned"], "tekken.json")
    complete = Writer.complete

    def changing(self: Writer) -> None:
        complete(self)
        put(job["aligned"], "tekken.json", text="ALIGNED: tekken.json")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "complete", changing)
        with pytest.raises(RunError, match=r"tekken\.json changed underway"):
            scale(**job)
    with pytest.raises(RequestError, match=r"side_files\.tekken\.json"):
        scale(**job)
    scale(**job, overwrite=True)
    assert (job["output"] / "tekken.json").read_text() == "ALIGNED: tekken.json"


def test_a_batch_does_not_pass_by_an_output_with_other_side_files(job: dict[str, Any], world: Any) -> None:
    put(job["aligned"], "tekken.json")
    jobs = {"jobs": [{k: str(v) if k != "factor" else v for k, v in job.items() if k != "quiet"} | {"method": "scale"}]}
    (world.root / "jobs.yaml").write_text(json.dumps(jobs))
    api.batch(world.root / "jobs.yaml", quiet=True)
    (again,) = api.batch(world.root / "jobs.yaml", quiet=True)
    assert again.plan.finished is not None
    put(job["aligned"], "tekken.json", text="another")
    with pytest.raises(RequestError, match="exists already"):
        api.batch(world.root / "jobs.yaml", quiet=True)
