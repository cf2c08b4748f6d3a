"""verify with --inputs and --recompute: honest outputs are clean, tampered ones and changed inputs are found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from safeshard.manifests.errors import RequestError
from safeshard.manifests.schema import Manifest, load
from safeshard.streamer import api, calibrate, safedelta, safelora, safemerge, scale
from safeshard.streamer.calibration import factors
from safeshard.streamer.cli.app import main
from safeshard.streamer.inputs import samples
from safeshard.streamer.recheck import inputs as recheck
from safeshard.streamer.recheck import recompute
from safeshard.streamer.sources import LocalSource

ALL = 1000


def lora_jobs(world: Any) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Jobs on adapters."""
    trio = world.trio()
    gated = {key: trio[key] for key in ("aligned", "unaligned", "adapter")}
    return {
        "linear": (safemerge, trio | {"threshold": 0.13}),
        "dare": (safemerge, trio | {"threshold": 0.13, "combine": "dare_linear", "density": 0.5, "seed": 3}),
        "exact": (safemerge, trio | {"threshold": 0.13, "combine": "exact"}),
        "svd": (safemerge, trio | {"threshold": 0.13, "combine": "svd", "rank": 5, "dtype": "float16"}),
        "safelora": (safelora, gated | {"threshold": 0.13}),
        "ranked": (safelora, gated | {"num_layers": 5}),
        "scale": (scale, {"aligned": trio["aligned"], "adapter": trio["adapter"], "factor": 0.25}),
    }


def full_jobs(world: Any) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Jobs on full checkpoints of three shards."""
    aligned = world.llama(2, seed=1)
    folders = {"aligned": world.checkpoint("aligned", aligned, 3)}
    for seed, role in enumerate(("unaligned", "finetuned", "safe")):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
        folders[role] = world.checkpoint(role, moved)
    gated = {role: folders[role] for role in ("aligned", "unaligned", "finetuned")}
    return {
        "full-safemerge": (safemerge, folders | {"threshold": 0.5}),
        "full-safelora": (safelora, gated | {"threshold": 0.5}),
        "full-ranked": (safelora, gated | {"num_layers": 5}),
        "full-scale": (scale, {"aligned": folders["aligned"], "finetuned": folders["finetuned"], "factor": 0.25}),
    }


LORA = ("linear", "dare", "exact", "svd", "safelora", "ranked", "scale")
FULL = ("full-safemerge", "full-safelora", "full-ranked", "full-scale")


def made(world: Any, name: str) -> Path:
    """The output of a job by its name."""
    function, options = (lora_jobs if name in LORA else full_jobs)(world)[name]
    output: Path = world.root / "out"
    function(**options, output=output, quiet=True)
    return output


def tamper(output: Path, tensor: str) -> None:
    """Change one element of a tensor and make the manifest fit, as whoever forges an output would."""
    manifest = load(output)
    entry = next(t for t in manifest.tensors if t.name == tensor)
    path = output / entry.file
    tensors = load_file(path)
    values = tensors[tensor].view(-1)
    values[len(values) // 2] += 1.0
    save_file(tensors, path, {"format": "pt"})
    digest = blake3(tensors[tensor].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    forged = tuple(t.model_copy(update={"blake3": digest}) if t.name == tensor else t for t in manifest.tensors)
    (output / "manifest.json").write_text(manifest.model_copy(update={"tensors": forged}).to_json())


def edit(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's JSON and seal it again."""
    path = output / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(Manifest.from_json(json.dumps(document)).to_json())


def found(output: Path, **options: Any) -> list[tuple[str, str]]:
    """(tensor or file, problem) of every finding of a recomputation of all modules."""
    return [(f.tensor or f.file, f.problem) for f in api.verify(output, **{"recompute": ALL} | options)]


DIFFERS = "hash differs from the one recomputed"


@pytest.mark.parametrize("name", LORA + FULL)
def test_an_honest_output_is_clean_and_a_forged_one_is_found(world: Any, name: str) -> None:
    output = made(world, name)
    before = {path: path.read_bytes() for path in world.root.rglob("*") if path.is_file()}
    for count, seed in ((1, 0), (3, 1), (ALL, 0)):
        assert api.verify(output, inputs=True, recompute=count, seed=seed) == []
    assert {path: path.read_bytes() for path in world.root.rglob("*") if path.is_file()} == before
    names = ["model.layers.1.mlp.up_proj.weight"]
    if name in LORA:  # SafeLoRA and scale write B alone: A is the adapter's own
        names = [f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight" for side in "AB"]
    for tensor in names:
        tamper(output, tensor)
    assert api.verify(output) == []
    assert found(output) == [(tensor, DIFFERS) for tensor in names]


def test_only_the_modules_chosen_are_computed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own seed's choice; another seed may choose others, and N are N."""
    output = made(world, "linear")
    chosen: list[list[str]] = []
    original = recompute.Pass.execute

    def spy(self: Any, runs: Any) -> None:
        original(self, runs)
        chosen.append(sorted(runs[0].entries))

    monkeypatch.setattr(recompute.Pass, "execute", spy)
    notes: list[str] = []
    for seed in (0, 0, 1):
        api.verify(output, recompute=4, seed=seed, note=notes.append)
    assert [len(names) for names in chosen] == [4, 4, 4]
    assert chosen[0] == chosen[1] != chosen[2]
    assert notes[0] == f"recomputed 4 of 14 modules: {', '.join(chosen[0])}"


def test_a_forged_module_is_found_by_a_choice_that_holds_it_alone(world: Any) -> None:
    output = made(world, "full-safemerge")
    tamper(output, "model.layers.1.mlp.up_proj.weight")
    notes: list[str] = []
    for seed in range(12):
        notes.clear()
        findings = api.verify(output, recompute=4, seed=seed, note=notes.append)
        assert bool(findings) == ("model.layers.1.mlp.up_proj" in notes[0])
    assert any(api.verify(output, recompute=4, seed=seed) for seed in range(12))


@pytest.mark.parametrize("name", ["linear", "ranked", "full-ranked"])
def test_an_edited_decision_is_found(world: Any, name: str) -> None:
    output = made(world, name)

    def change(document: dict[str, Any]) -> None:
        document["modules"][2]["decision"] = "reverted"
        document["modules"][3]["cosine"] += 1e-9

    edit(output, change)
    names = [module.name for module in load(output).modules]
    assert api.verify(output) == []
    assert found(output) == [
        (names[2], "decision differs from the one recomputed"),
        (names[3], "cosine differs from the one recomputed"),
    ]


def test_modules_that_the_manifest_leaves_out_are_found(world: Any) -> None:
    output = made(world, "linear")
    gone = load(output).modules[5].name
    edit(output, lambda document: document["modules"].pop(5))
    assert found(output) == [(gone, "a module that the manifest does not name")]


def test_the_other_cosines_of_a_ranking_come_from_the_manifest(world: Any) -> None:
    """One module of five projected, recomputed alone, is still among the five lowest, and no other is."""
    output = made(world, "ranked")
    decisions = {module.name: module.decision for module in load(output).modules}
    assert sorted(decisions.values()) == ["kept"] * 9 + ["projected"] * 5
    assert all(api.verify(output, recompute=1, seed=seed) == [] for seed in range(20))


def test_the_limit_that_a_number_of_layers_implies_is_recorded(world: Any) -> None:
    modules = load(made(world, "ranked")).modules
    fifth = sorted(module.cosine for module in modules if module.cosine is not None)[4]
    assert {module.threshold for module in modules} == {fifth}
    assert {module.near_threshold for module in modules} == {None}


def test_another_torch_is_a_note(world: Any) -> None:
    output = made(world, "linear")
    edit(output, lambda document: document["tool"].update(torch="1.0", device="Some GPU"))
    notes: list[str] = []
    assert api.verify(output, recompute=1, note=notes.append) == []
    told = [note for note in notes if "last bits may differ" in note]
    assert [note.split(" is ")[0] for note in told] == ["torch: 1.0", "device: Some GPU"]


# --- Safe Delta


@pytest.fixture(params=["calibration", "factors"])
def calibrated(request: pytest.FixtureRequest, llama: Any) -> Callable[..., Path]:
    """Safe Delta on the Llama case, calibrated in place or by saved factors."""

    def run(**options: Any) -> Path:
        if request.param == "factors":
            keys = {"aligned", "calibration", "samples", "percdamp", "dtype"}
            given = {key: value for key, value in llama.options("x").items() if key in keys}
            calibrate(**given, output=llama.root / "factors", quiet=True)
            options["factors"] = llama.root / "factors"
        safedelta(**llama.options("out", strength=2.0, **options))
        output: Path = llama.root / "out"
        return output

    return run


@pytest.mark.parametrize("kind", ["adapter", "finetuned", "checkpoint"])
def test_safe_delta(llama: Any, calibrated: Callable[..., Path], kind: str) -> None:
    options = {
        "adapter": {},
        "finetuned": {"finetuned": llama.root / "finetuned"},
        "checkpoint": {"output_format": "checkpoint", "selection": "row"},
    }[kind]
    output = calibrated(**options)
    for count, seed in ((2, 0), (ALL, 0)):
        assert api.verify(output, inputs=True, recompute=count, seed=seed) == []
    tensor = next(t.name for t in load(output).tensors if "layers.1.mlp.up_proj" in t.name)
    tamper(output, tensor)
    assert api.verify(output, inputs=True) == []
    assert found(output) == [(tensor, DIFFERS)]


def test_calibration_runs_to_the_deepest_layer_that_is_chosen(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.run("out", strength=2.0)
    layers: list[int] = []
    original = factors.calibrate

    def counted(*args: Any, **kwargs: Any) -> Any:
        for layer in original(*args, **kwargs):
            layers.append(layer.index)
            yield layer

    monkeypatch.setattr(factors, "calibrate", counted)
    depths = set()
    for seed in range(8):
        layers.clear()
        notes: list[str] = []
        assert api.verify(llama.root / "out", recompute=1, seed=seed, note=notes.append) == []
        deepest = int(notes[0].partition("layers.")[2][0])
        assert layers == [deepest]  # those before it have nothing to give
        depths.add(deepest)
    assert depths == {0, 1}


def test_changed_calibration_data_is_found(llama: Any) -> None:
    llama.run("out")
    moved = llama.root / "moved.jsonl"
    shutil.copy(llama.data, moved)
    assert api.verify(llama.root / "out", inputs=True, sources={"calibration": moved}) == []
    moved.write_text(moved.read_text().replace("[", "[1, ", 1))
    assert [f.problem for f in api.verify(llama.root / "out", inputs=True, sources={"calibration": moved})] == [
        "calibration: size differs"
    ]
    moved.unlink()
    assert [f.problem for f in api.verify(llama.root / "out", inputs=True, sources={"calibration": moved})] == [
        "calibration: missing"
    ]


# --- inputs


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def problems(output: Path, **options: Any) -> list[str]:
    return [f.problem for f in api.verify(output, inputs=True, **options)]


@pytest.mark.parametrize("name", ["linear", "full-safemerge"])
def test_a_flipped_bit_in_any_input_is_found_and_refused(world: Any, name: str) -> None:
    """Of small files: their headers are the same, their contents are hashed whole."""
    output = made(world, name)
    for role, given in load(output).inputs.items():
        for file in given.files:
            path = Path(given.source) / file.name
            kept = path.read_bytes()
            flip(path, -1 if file.header_sha256 else kept.index(b":") + 1)
            assert problems(output) == [f"{role}: content differs"]
            with pytest.raises(RequestError, match=f"{role}: content differs"):
                api.verify(output, recompute=1)
            path.write_bytes(kept)
    assert problems(output) == []


def test_large_files_are_sampled_in_the_middle_of_each_tensor(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash against its definition; an edit in a sample shows, one outside of the samples does not."""
    monkeypatch.setattr(samples, "WHOLE_BYTES", 0)
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 64)
    output = made(world, "linear")
    path = world.root / "unaligned/model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    spans = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    expected = blake3()
    for begin, end in spans:
        size = min(64, end - begin)
        first = start + begin + (end - begin - size) // 2
        expected.update(raw[first : first + size])
    [file] = [f for f in load(output).inputs["unaligned"].files if f.header_sha256]
    assert file.sample_blake3 == expected.hexdigest()
    begin, end = spans[0]
    flip(path, start + (begin + end) // 2)
    assert problems(output) == ["unaligned: content differs"]
    path.write_bytes(raw)
    flip(path, start + begin)
    assert problems(output) == []


def test_inputs_that_are_gone_or_moved(world: Any) -> None:
    output = made(world, "linear")
    (world.root / "adapter").rename(world.root / "elsewhere")
    assert problems(output) == ["adapter cannot be opened"]
    with pytest.raises(RequestError, match="--source ROLE=PLACE"):
        api.verify(output, recompute=1)
    moved = {"adapter": world.root / "elsewhere"}
    assert api.verify(output, inputs=True, recompute=ALL, sources=moved) == []
    (world.root / "elsewhere/adapter_config.json").unlink()
    assert problems(output, sources=moved) == ["adapter: missing"]
    assert problems(output, sources={"adapter": world.root / "safe"}) == ["adapter: content differs"]
    with pytest.raises(RequestError, match="a role among aligned, unaligned, adapter, safe_adapter"):
        api.verify(output, inputs=True, sources={"finetuned": "x"})


def test_a_retrained_checkpoint_of_the_same_architecture_is_found(world: Any) -> None:
    output = made(world, "full-safemerge")
    shutil.rmtree(world.root / "safe")
    world.checkpoint("safe", world.llama(2, seed=9))
    assert problems(output) == ["safe: content differs"]


def test_a_commit_pins_a_hub_repository(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened at its commit whatever the branch is now; a local copy is compared as far as that goes."""
    output = made(world, "linear")
    commit = "0123456789" * 4

    def change(document: dict[str, Any]) -> None:
        document["inputs"]["aligned"] |= {"source": "org/chat@main", "revision": commit}
        for file in document["inputs"]["aligned"]["files"]:
            file.pop("sample_blake3", None)

    edit(output, change)
    asked: list[str] = []

    def opened(spec: str) -> Any:
        if not spec.startswith("hf://"):
            return original(spec)
        asked.append(spec)
        return LocalSource(world.root / "aligned", spec, revisions[-1])

    original, revisions = recheck.open_source, [commit]
    monkeypatch.setattr(recheck, "open_source", opened)
    assert problems(output) == []
    revisions.append("f" * 40)
    assert problems(output) == ["aligned: revision differs"]
    assert asked == [f"hf://org/chat@{commit}"] * 2
    notes: list[str] = []
    assert problems(output, sources={"aligned": world.root / "aligned"}, note=notes.append) == []
    assert "by sizes and headers alone" in notes[0]


def test_a_manifest_without_content_hashes_is_a_note(world: Any) -> None:
    output = made(world, "scale")
    edit(output, lambda document: document["inputs"]["adapter"]["files"][0].pop("sample_blake3"))
    notes: list[str] = []
    assert problems(output, note=notes.append) == []
    assert [note.partition(",")[0] for note in notes] == ["adapter: recorded without a hash of its content"]


# --- hostile manifests


@pytest.mark.parametrize("url", ["s3://bucket/model", "memory://x", "simplecache::http://host/x"])
def test_a_url_that_only_the_manifest_names_is_not_opened(
    world: Any, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    output = made(world, "linear")
    edit(output, lambda document: document["inputs"]["adapter"].update(source=url))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *args, **kwargs: pytest.fail("opened"))
    for options in ({"inputs": True}, {"recompute": 1}):
        with pytest.raises(RequestError, match="add --source adapter=URL if you trust it"):
            api.verify(output, **options)
    assert problems(output, sources={"adapter": world.root / "adapter"}) == []


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret"])
def test_files_outside_of_an_input_are_not_opened(world: Any, name: str) -> None:
    output = made(world, "linear")
    (world.root / "secret").write_text("x")
    edit(output, lambda document: document["inputs"]["adapter"]["files"][1].update(name=name))
    assert problems(output) == ["adapter: missing"]


def test_a_pipe_in_place_of_calibration_data_is_not_waited_for(llama: Any) -> None:
    llama.run("out")
    os.mkfifo(llama.root / "pipe")
    assert problems(llama.root / "out", sources={"calibration": llama.root / "pipe"}) == ["calibration: missing"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["method"].update(name="dare"), "one of safemerge, safelora"),
        (lambda d: d["method"]["options"].update(threshold="low"), "threshold"),
        (lambda d: d["method"]["options"].update(surprise=1), "a known option"),
        (lambda d: d["method"]["options"].update(output="/etc"), "options that name no place"),
        (lambda d: d["method"]["options"].update(safe="memory://x"), "options that name no place"),
        (lambda d: d["inputs"].update(output=d["inputs"]["adapter"]), "options that name no place"),
        (lambda d: d["inputs"].pop("unaligned"), "unaligned"),
    ],
)
def test_a_manifest_that_describes_no_job_is_refused(
    world: Any, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    output = made(world, "linear")
    edit(output, change)
    with pytest.raises(RequestError, match=expected):
        api.verify(output, recompute=1)


def test_a_manifest_that_cannot_be_read_is_a_finding(world: Any) -> None:
    output = made(world, "linear")
    (output / "manifest.json").write_text("{}")
    assert {f.file for f in api.verify(output, inputs=True, recompute=1)} == {"manifest.json"}


# --- the command line


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = made(world, "linear")
    status, out, _ = command(capsys, "verify", output, "--inputs", "--recompute", 2, "--seed", 1, "--json")
    assert status == 0
    outcome = json.loads(out.splitlines()[-1])
    assert outcome["differences"] == []
    assert outcome["notes"][0].startswith("recomputed 2 of 14 modules: model.layers.")
    (world.root / "adapter").rename(world.root / "elsewhere")
    status, out, _ = command(capsys, "verify", output, "--inputs")
    assert (status, "adapter cannot be opened" in out) == (1, True)
    status, _, err = command(capsys, "verify", output, "--recompute", 1)
    assert (status, "--source ROLE=PLACE" in err) == (2, True)
    place = f"adapter={world.root / 'elsewhere'}"
    assert command(capsys, "verify", output, "--recompute", 1, "--source", place)[0] == 0
    tamper(output, "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    status, out, _ = command(capsys, "verify", output, "--recompute", ALL, "--source", place)
    assert (status, DIFFERS in out) == (1, True)


@pytest.mark.parametrize("words", [["--recompute", "-1"], ["--source", "adapter"], ["--source", "adapter="]])
def test_wrong_options(world: Any, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    status, _, err = command(capsys, "verify", made(world, "scale"), "--inputs", *words)
    assert status == 2
    assert "Traceback" not in err


def test_samples_are_the_same_wherever_the_files_lie(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WHOLE_BYTES", 0)
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 64)
    output = made(world, "scale")
    remote = fsspec.filesystem("memory")
    remote.put(str(world.root / "aligned"), "/far-away", recursive=True)
    assert problems(output, sources={"aligned": "memory://far-away"}) == []
    path = "/far-away/model.safetensors"
    data = bytearray(remote.cat_file(path))
    data[-1] ^= 1
    remote.pipe_file(path, bytes(data))
    assert problems(output, sources={"aligned": "memory://far-away"}) == ["aligned: content differs"]
    remote.rm("/far-away", recursive=True)
