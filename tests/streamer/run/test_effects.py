"""What is left of a delta, and the warnings about it: against deltas in fp64 from the files alone."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.schema import Manifest, load
from safeshard.streamer import batch, inspect, report, safelora, safemerge, scale, verify
from safeshard.streamer.cli.app import main
from safeshard.streamer.run.ending.cautions import _size

Tensors = dict[str, Tensor]


def scaling(folder: Path, rank: int) -> float:
    """Of every module of an adapter, as PEFT computes it where no pattern says otherwise."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("alpha_pattern")
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def deltas(folder: Path) -> Tensors:
    """Module -> scaling * B A in fp64."""
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scaling(folder, len(a)) * b.double() @ a.double()
    return found


def full_deltas(aligned: Tensors, folder: Path, names: list[str]) -> Tensors:
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    return {n.removesuffix(".weight"): tensors[n].double() - aligned[n].double() for n in names}


def expected(old: list[Tensor], new: list[Tensor]) -> tuple[float, float, float]:
    before = math.sqrt(sum(float(d.square().sum()) for d in old))
    after = math.sqrt(sum(float(d.square().sum()) for d in new))
    inner = sum(float((d * n).sum()) for d, n in zip(old, new, strict=True))
    return after / before, inner / (before * after), before


def assert_effects(out: Path, old: Tensors, new: Tensors, rel: float = 1e-9, norm: float | None = None) -> Manifest:
    manifest = load(out)
    assert {m.name for m in manifest.modules} == old.keys()
    effects = {m.name: m.effect for m in manifest.modules} | {"": manifest.effect}
    for name, effect in effects.items():
        names = [name] if name else sorted(old)
        kept, cosine, size = expected([old[n] for n in names], [new[n] for n in names])
        assert effect is not None
        assert effect.kept_norm == pytest.approx(kept, rel=rel)
        assert effect.cosine == pytest.approx(cosine, rel=rel)
        assert effect.delta_norm == pytest.approx(size, rel=norm or rel)
    return manifest


@pytest.fixture
def trio(world: Any) -> dict[str, Path]:
    paths: dict[str, Path] = world.trio()
    return paths


def gate(trio: dict[str, Path]) -> dict[str, Path]:
    return {role: trio[role] for role in ("aligned", "unaligned", "adapter")}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("safemerge", {"threshold": 0.75}),
        ("safemerge", {"threshold": 0.75, "combine": "exact", "dtype": "bfloat16"}),
        ("safemerge", {"threshold": 0.75, "combine": "svd", "rank": 4}),
        ("safelora", {"num_layers": 5}),
        ("scale", {"factor": 0.3, "dtype": "bfloat16"}),
    ],
)
def test_of_adapters_exactly_as_written(
    world: Any, trio: dict[str, Path], method: str, options: dict[str, Any]
) -> None:
    out = world.root / "out"
    inputs = gate(trio) if method != "scale" else {k: trio[k] for k in ("aligned", "adapter")}
    if method == "safemerge":
        inputs["safe_adapter"] = trio["safe_adapter"]
    function = {"safemerge": safemerge, "safelora": safelora, "scale": scale}[method]
    function(**inputs, **options, output=out, quiet=True)
    manifest = assert_effects(out, deltas(trio["adapter"]), deltas(out))
    kept = {m.decision == "kept" for m in manifest.modules}
    assert method == "scale" or kept == {True, False}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("safemerge", {"threshold": 0.75}),
        ("safelora", {"num_layers": 5}),
        ("scale", {"factor": 0.3}),
        ("scale", {"factor": 1.5, "dtype": "float32"}),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_of_full_checkpoints_as_written(world: Any, method: str, options: dict[str, Any], shards: int) -> None:
    """Rounding to bf16 included, which is most of what a small delta of these has."""
    aligned = world.llama(2, seed=1)

    def moved(seed: int, by: float) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return {n: (t.float() + by * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in aligned.items()}

    places = {
        role: world.checkpoint(role, tensors, shards)
        for role, tensors in {
            "aligned": aligned, "unaligned": moved(1, 0.3), "finetuned": moved(2, 0.05), "safe": moved(3, 0.05),
        }.items()
    }  # fmt: skip
    roles = {"safemerge": 4, "safelora": 3, "scale": 3}[method]
    inputs = {r: p for r, p in list(places.items())[:roles] if method != "scale" or r != "unaligned"}
    out = world.root / "out"
    {"safemerge": safemerge, "safelora": safelora, "scale": scale}[method](**inputs, **options, output=out, quiet=True)
    names = [n for n in aligned if method == "scale" or "_proj." in n]
    old = full_deltas(aligned, places["finetuned"], names)
    assert_effects(out, old, full_deltas(aligned, out, names), rel=1e-5)


def test_of_a_large_weight_within_a_percent(world: Any) -> None:
    world.sizes = {"hidden": 512, "kv": 16, "inner": 2048}
    aligned = world.llama(1, seed=1)
    tuned = {n: (t.float() + 0.02 * torch.randn(t.shape)).bfloat16() for n, t in aligned.items()}
    out = world.root / "out"
    places = {"aligned": world.checkpoint("aligned", aligned), "finetuned": world.checkpoint("finetuned", tuned)}
    scale(**places, factor=0.4, output=out, quiet=True)
    manifest = assert_effects(
        out,
        full_deltas(aligned, places["finetuned"], list(aligned)),
        full_deltas(aligned, out, list(aligned)),
        1e-2,
        5e-2,
    )
    assert any(t.shape == (2048, 512) for t in manifest.tensors)


def test_a_zero_delta_has_no_share(world: Any, trio: dict[str, Path]) -> None:
    tensors = load_file(trio["adapter"] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    zeroed = world.adapter("zeroed", {}, tensors=tensors | {name: torch.zeros_like(tensors[name])})
    result = safelora(
        aligned=trio["aligned"], unaligned=trio["unaligned"], adapter=zeroed, num_layers=2, output=world.root / "out",
        quiet=True,
    )  # fmt: skip
    entries = {m.name: m for m in load(world.root / "out").modules}
    effect = entries["model.layers.0.self_attn.q_proj"].effect
    assert effect is not None
    assert (effect.kept_norm, effect.cosine, effect.delta_norm) == (None, None, 0.0)
    assert [w.kind for w in result.warnings] == ["undefined"]
    assert "1 of 14 modules" in result.warnings[0].text


def test_a_resumed_job_says_the_same(world: Any, trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = gate(trio) | {"num_layers": 3, "quiet": True}
    safelora(**options, output=world.root / "undisturbed")
    write, calls = os.pwrite, []

    def failing(*args: Any) -> int:
        calls.append(args)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(RunError):
            safelora(**options, output=world.root / "out")
    assert '"effect"' in (world.root / "out.partial/journal.jsonl").read_text()
    safelora(**options, output=world.root / "out")
    resumed, undisturbed = load(world.root / "out"), load(world.root / "undisturbed")
    assert resumed.modules == undisturbed.modules
    assert (resumed.effect, resumed.warnings) == (undisturbed.effect, undisturbed.warnings)


def test_recomputing_compares_the_effect_where_the_manifest_has_it(world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    safelora(**gate(trio), num_layers=3, output=out, quiet=True)
    assert verify(out, recompute=14) == []
    manifest = load(out)
    modules = [m.model_copy(update={"effect": None}) for m in manifest.modules]
    older = manifest.model_copy(update={"modules": tuple(modules), "effect": None})
    (out / "manifest.json").write_text(older.to_json())
    assert verify(out, recompute=14) == []
    forged = manifest.modules[0].model_copy(update={"effect": manifest.effect})
    (out / "manifest.json").write_text(
        manifest.model_copy(update={"modules": (forged, *manifest.modules[1:])}).to_json()
    )
    assert [f.problem for f in verify(out, recompute=14)] == ["effect differs from the one recomputed"]


def kinds(out: Path) -> list[str]:
    return [each.kind for each in load(out).warnings or ()]


def test_nothing_changed_is_said_with_the_threshold_that_would(world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    result = safelora(**gate(trio), threshold=-0.9, output=out, quiet=True)
    [warning] = result.warnings
    assert warning.kind == "unchanged"
    cosines = [m.cosine for m in load(out).modules if m.cosine is not None]
    assert f"between {min(cosines):.4f} and {max(cosines):.4f}" in warning.text
    assert warning.remedy is not None
    threshold = float(warning.remedy.split()[1])
    again = safelora(**gate(trio), threshold=threshold, output=world.root / "again", quiet=True)
    assert again.manifest is not None
    assert sum(m.decision != "kept" for m in again.manifest.modules) >= 1


@pytest.mark.parametrize(
    ("factor", "kind"), [(0.07, "removed"), (0.0, "removed"), (1.0, "unchanged"), (1.4, "grew"), (-0.5, "removed")]
)
@pytest.mark.parametrize("role", ["adapter", "finetuned"])
def test_the_size_of_what_is_left_is_warned_about(
    world: Any, trio: dict[str, Path], role: str, factor: float, kind: str
) -> None:
    inputs = {"aligned": trio["aligned"], role: trio["adapter" if role == "adapter" else "unaligned"]}
    result = scale(**inputs, factor=factor, output=world.root / "out", quiet=True)
    assert [w.kind for w in result.warnings if w.kind != "value"] == [kind]
    assert kinds(world.root / "out") == [w.kind for w in result.warnings]
    assert ("value" in kinds(world.root / "out")) == (not 0 <= factor <= 1)
    assert scale(**inputs, factor=0.5, output=world.root / "half", quiet=True).warnings == ()


def test_growth_of_one_module_is_not_called_growth_of_the_whole(world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    result = scale(aligned=trio["aligned"], adapter=trio["adapter"], factor=1.4, output=out, quiet=True)
    [grew] = [w for w in result.warnings if w.kind == "grew"]
    assert grew.text.startswith("the delta grew: its norm is 140.0% of the fine-tuned one's; 14 of 14 grew")
    assert grew.remedy == "check --factor"
    job_run = SimpleNamespace(job=SimpleNamespace(keeps_more="", grows="look"))
    entries = [{"name": "a", "effect": {"kept_norm": 1.3}}, {"name": "b", "effect": {"kept_norm": 0.5}}]
    effect = SimpleNamespace(kept_norm=0.8, cosine=0.9)
    [grew] = _size(job_run, entries, effect)  # type: ignore[arg-type]
    assert grew.text == "the delta grew in single modules: 1 of 2 grew, most a to 130.0%"


def test_thresholds_and_weights_out_of_range(world: Any, trio: dict[str, Path]) -> None:
    result = safemerge(**trio, threshold=5.0, weights=(1.2, -0.2), output=world.root / "out", quiet=True)
    texts = [w.text for w in result.warnings if w.kind == "value"]
    assert [text.split(":")[0] for text in texts] == [
        "--threshold 5 lies outside of [-1, 1]", "--weights 1.2 -0.2",
    ]  # fmt: skip


def test_shown_in_inspect_report_and_card(world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    scale(aligned=trio["aligned"], adapter=trio["adapter"], factor=0.07, output=out, quiet=True)
    warning = "nearly all of the fine-tuned delta was removed: 7.0% of its norm is left"
    left = "7.0% of the fine-tuned delta's norm is left, at a cosine of 1.0000 to it"
    table, card = inspect(out, width=200), (out / "README.md").read_text()
    assert left in table
    assert f"warning  {warning}" in " ".join(table.split(" ")).replace("   ", "  ") or warning in table
    assert table.count(" 7.0%") >= 14
    assert left in card
    assert warning in card
    page = report(out).read_text()
    assert warning in page
    assert "norm left" in page
    assert verify(out) == []


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    return stop.value.code if isinstance(stop.value.code, int) else 0, *capsys.readouterr()


def words(inputs: dict[str, Path]) -> Iterator[object]:
    for role, place in inputs.items():
        yield from (f"--{role.replace('_', '-')}", place)


def test_the_command_line_warns_on_stderr(
    capsys: pytest.CaptureFixture[str], world: Any, trio: dict[str, Path]
) -> None:
    argv = ["safelora", *words(gate(trio)), "--threshold", "-0.9", "--output", world.root / "out"]
    status, out, err = command(capsys, *argv)
    assert status == 0
    assert err.count("\n") == 1
    assert err.startswith(f"safeshard: warning: {world.root / 'out'}: nothing was changed: all 14 modules")
    assert "100.0% of the fine-tuned delta's norm is left" in out
    status, out, _ = command(capsys, *argv, "--quiet", "--json", "--overwrite")
    [outcome] = json.loads(out)
    assert outcome["effect"]["kept_norm"] == 1
    assert [w["kind"] for w in outcome["warnings"]] == ["unchanged"]


def test_strict_refuses_before_anything_is_written_what_headers_show(
    capsys: pytest.CaptureFixture[str], world: Any, trio: dict[str, Path]
) -> None:
    argv = ["scale", *words({k: trio[k] for k in ("aligned", "adapter")}), "--factor", "50", "--output"]
    before = sorted(world.root.rglob("*"))
    status, _, err = command(capsys, *argv, world.root / "out", "--strict")
    assert status == 2
    assert "--factor 50 lies outside of [0, 1]" in err
    assert sorted(world.root.rglob("*")) == before
    with pytest.raises(RequestError):
        scale(aligned=trio["aligned"], adapter=trio["adapter"], factor=50, output=world.root / "out", strict=True)


def test_strict_gives_no_doubtful_output_its_name(
    capsys: pytest.CaptureFixture[str], world: Any, trio: dict[str, Path]
) -> None:
    """The same command without it finishes at once what was computed; a batch publishes the others."""
    out = world.root / "out"
    argv = ["safelora", *words(gate(trio)), "--threshold", "-0.9", "--quiet", "--output"]
    status, _, err = command(capsys, *argv, out, "--strict")
    assert status == 1
    assert "nothing was changed" in err
    assert "without --strict" in err
    assert not out.exists()
    journal = world.root / "out.partial/journal.jsonl"
    assert journal.read_text().count('"kind":"module"') == 14
    assert command(capsys, *argv, out)[0] == 0
    assert command(capsys, *argv, world.root / "plain")[0] == 0
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (world.root / "plain" / name).read_bytes()
    jobs = world.root / "jobs.yaml"
    shared = {k: str(v) for k, v in gate(trio).items()} | {"method": "safelora"}
    outputs = [{"threshold": t, "output": str(world.root / f"batch{i}")} for i, t in enumerate((-0.9, 0.9))]
    jobs.write_text(json.dumps({"jobs": [shared | each for each in outputs]}))
    with pytest.raises(RunError, match="batch0: nothing was changed"):
        batch(jobs, strict=True, quiet=True)
    assert not (world.root / "batch0").exists()
    assert (world.root / "batch1").exists()


@pytest.mark.parametrize("change", ["lora_B", "lora_alpha"])
def test_an_adapter_that_changes_nothing_is_said_to(
    capsys: pytest.CaptureFixture[str], world: Any, trio: dict[str, Path], change: str
) -> None:
    file = trio["adapter"] / ("adapter_model.safetensors" if change == "lora_B" else "adapter_config.json")
    if change == "lora_B":
        tensors = load_file(file)
        save_file({n: t.zero_() if change in n else t for n, t in tensors.items()}, file, {"format": "pt"})
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {change: 0}))
    argv = ["scale", *words({k: trio[k] for k in ("aligned", "adapter")}), "--factor", "0.5", "--output"]
    status, _, err = command(capsys, *argv, world.root / "out")
    assert status == 0
    assert "the fine-tuned delta is zero in all 14 modules" in err
