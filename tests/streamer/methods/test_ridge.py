"""Ridge end to end against the dense formula in fp64, with Grams computed apart from the code under test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.kernels.calibrated import grams
from safeshard.kernels.calibrated.stacks import Operator, stacked
from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.schema import Manifest, load
from safeshard.streamer import batch, calibrate, ridge, safedelta, verify
from safeshard.streamer.cli.app import main
from safeshard.streamer.methods.ridge import Ridge
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.run.result import Result

ADAPTER = "adapter_model.safetensors"
KINDS = ("llama", "qwen2", "phi3", "gpt2")
CALIBRATION = ("calibration", "samples", "dtype")


def options(it: Any, out: str, **given: Any) -> dict[str, Any]:
    common = {key: value for key, value in it.options(out, **given).items() if key not in ("block_size", "sub_block")}
    return {key: value for key, value in common.items() if key != "percdamp" or "percdamp" in given}


def run(it: Any, out: str, **given: Any) -> tuple[Result, dict[str, Tensor]]:
    return ridge(**options(it, out, **given)), it.tensors(out)


def written(delta: Tensor, gram: Tensor, penalty: float, keep: Tensor | None = None) -> Tensor:
    """X by the definition, in fp64."""
    eye = torch.eye(len(gram), dtype=torch.float64)
    p = eye if keep is None else keep / keep.diagonal().mean() + 1e-3 * eye
    return delta.double() @ p @ torch.linalg.inv(p + penalty / gram.diagonal().mean() * gram)


def energy(delta: Tensor, gram: Tensor) -> float:
    return float(((delta.double() @ gram) * delta.double()).sum())


def manifest_of(result: Result) -> Manifest:
    assert result.manifest is not None
    return result.manifest


def assert_near(got: Tensor, expected: Tensor, rounding: float = 0.0, tolerance: float = 2e-4) -> None:
    """The forward pass in fp32 decides how well the tiny models' Grams are known."""
    assert (got - expected).norm() <= tolerance * expected.norm() + rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("penalty", "share"), [(0.3, 48), (0.2, 48), (0.2, 1)])
def test_adapter(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, penalty: float, share: int
) -> None:
    """Rank, shapes, B and config stay; the product is the closed form; what the manifest says of leaks is so.

    With a factor of its own, or at 1 column for each row already with that of a penalty of 0.3.
    """
    monkeypatch.setattr(grams, "SHARE", share)
    it = case(kind)
    result, got = run(it, f"ridge-lora-{tmp_path.name}", penalty=penalty)
    tuned = load_file(it.adapter / "adapter_model.safetensors")
    assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in tuned.items()}
    assert all(torch.equal(t, tuned[name]) for name, t in got.items() if "lora_A" not in name)
    before, after = it.deltas(it.adapter, tuned), it.deltas(it.adapter, got)
    entries = {module.name: module for module in manifest_of(result).modules}
    left = whole = 0.0
    for module, gram in it.grams.items():
        expected = written(before[module], gram, penalty)
        assert_near(after[module], expected)
        [entry] = [entry for name, entry in entries.items() if name.endswith(module)]
        assert entry.decision == "shrunk"
        assert entry.penalty == penalty
        assert entry.energy == pytest.approx(energy(before[module], gram), rel=1e-3)
        assert entry.leak == pytest.approx(energy(expected, gram) / energy(before[module], gram), rel=2e-3)
        left, whole = left + energy(expected, gram), whole + energy(before[module], gram)
    assert manifest_of(result).leak == pytest.approx(left / whole, rel=2e-3)
    config = json.loads((it.root / f"ridge-lora-{tmp_path.name}/adapter_config.json").read_text())
    assert config == json.loads((it.adapter / "adapter_config.json").read_text())
    assert it.loaded(it.root / f"ridge-lora-{tmp_path.name}").keys() == it.grams.keys()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rest", ["finetuned", "aligned"])
def test_full_checkpoint(case: Any, tmp_path: Path, kind: str, rest: str) -> None:
    it = case(kind)
    result, got = run(it, f"full-{tmp_path.name}", finetuned=it.root / "finetuned", penalty=1.0, rest=rest)
    treated = set()
    for module, gram in it.grams.items():
        aligned, tuned = it.weight(it.aligned, module), it.weight(it.finetuned, module)
        weight = it.weight(got, module)
        expected = written((tuned.double() - aligned.double()), gram, 1.0)
        assert_near(weight.double() - aligned.double(), expected, 2.0**-22 * float(weight.norm()))
        treated.add(next(n for n in got if it.weight(got, module).data_ptr() == got[n].data_ptr()))
    source = it.finetuned if rest == "finetuned" else it.aligned
    assert all(torch.equal(got[name], source[name]) for name in got.keys() - treated)
    assert {m.decision for m in manifest_of(result).modules} == {"shrunk"}


def test_a_penalty_of_nothing_gives_back_the_fine_tune_byte_for_byte(llama: Any) -> None:
    run(llama, "lora", penalty=0)
    adapter = {
        (llama.adapter / "adapter_model.safetensors").name: load_file(llama.adapter / "adapter_model.safetensors")
    }
    assert all(torch.equal(t, llama.tensors("lora")[name]) for name, t in next(iter(adapter.values())).items())
    result, got = run(llama, "full", penalty=0, finetuned=llama.root / "finetuned")
    assert all(torch.equal(t.view(torch.int32), llama.finetuned[name].view(torch.int32)) for name, t in got.items())
    assert {m.decision for m in manifest_of(result).modules} == {"kept"}
    assert manifest_of(result).leak == 1
    assert {t.action for t in manifest_of(result).tensors} == {"copied"}


@pytest.mark.parametrize("leak", [0.3, 0.05, 0.004])
def test_the_leak_decides_the_penalty(llama: Any, leak: float) -> None:
    result, _ = run(llama, "out", leak=leak)
    found = manifest_of(result)
    assert found.leak == pytest.approx(leak, rel=0.02)
    [penalty] = {module.penalty for module in found.modules}
    again, _ = run(llama, "again", penalty=penalty)
    assert llama.weights("again") == llama.weights("out")
    assert manifest_of(again).leak == found.leak


def test_the_default_is_a_leak(llama: Any) -> None:
    result, _ = run(llama, "out")
    assert manifest_of(result).method.options["leak"] == 0.008
    assert manifest_of(result).leak == pytest.approx(0.008, rel=0.02)


def test_saved_grams_give_the_same_bytes(llama: Any) -> None:
    calibrate(**{k: v for k, v in options(llama, "factors").items() if k != "adapter"})
    for name, given in (("lora", {}), ("full", {"finetuned": llama.root / "finetuned"})):
        run(llama, f"{name}-live", **given)
        run(llama, f"{name}-saved", factors=llama.root / "factors", **given)
        assert llama.weights(f"{name}-live") == llama.weights(f"{name}-saved")
    folder = llama.root / "grams"
    calibrate(**{k: v for k, v in options(llama, "grams", save="grams").items() if k != "adapter"})
    run(llama, "from-grams", factors=folder)
    assert llama.weights("from-grams") == llama.weights("lora-live")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size < sum(file.stat().st_size for file in (llama.root / "factors").glob("*.safetensors"))


def test_safe_delta_from_saved_grams_at_any_damping(llama: Any) -> None:
    """From Grams alone, with the damping that was asked for, or the one of calibrate: the bytes of a calibration."""
    calibrate(**{k: v for k, v in options(llama, "grams", save="grams").items() if k != "adapter"})
    block = {"block_size": 20, "sub_block": 4, "strength": 2.0}
    for damping in (0.1, 0.03):
        safedelta(**options(llama, f"live-{damping}", percdamp=damping), **block)
        safedelta(**options(llama, f"saved-{damping}", factors=llama.root / "grams", percdamp=damping), **block)
        assert llama.weights(f"live-{damping}") == llama.weights(f"saved-{damping}")


@pytest.mark.parametrize("shares", [False, True])
def test_many_jobs_of_one_pass_are_as_alone(llama: Any, monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    """Whatever their order: penalties and leaks, adapters and checkpoints, and Safe Delta beside them.

    `shares`: adapters of different penalties take one factor, as those of models of a real width do.
    """
    if shares:
        monkeypatch.setattr(grams, "SHARE", 1)
    together: list[int] = []

    def counted(matrices: Sequence[Tensor], apply: Operator, kind: str) -> list[Tensor]:
        together.append(len(matrices))
        return stacked(matrices, apply, kind)

    monkeypatch.setattr(grams, "stacked", counted)
    other = llama.make_adapter("other", seed=5, target_modules=["q_proj", "up_proj"])
    variants: list[dict[str, Any]] = [
        {"penalty": 0.1}, {"penalty": 0.12}, {"penalty": 1.0}, {"adapter": str(other), "penalty": 0.1},
        {"adapter": str(other)},
        {"leak": 0.05}, {"finetuned": str(llama.root / "finetuned"), "adapter": None, "penalty": 0.1},
        {"method": "safedelta", "strength": 2.0}, {"method": "safedelta", "strength": 2.0, "percdamp": 0.05},
    ]  # fmt: skip
    common = {k: str(v) for k, v in options(llama, "unused").items() if k in ("aligned", "calibration", "dtype")}
    common["samples"] = options(llama, "unused")["samples"]
    jobs = [
        {
            "method": "ridge",
            "adapter": str(llama.adapter),
            "output": str(llama.root / f"batch-{i}"),
            **common,
            **variant,
        }
        for i, variant in enumerate(variants)
    ]
    file = llama.root / "jobs.yaml"
    file.write_text(json.dumps({"jobs": jobs[::-1]}))
    batch(file, quiet=True)
    assert max(together) > 3  # more than one job's modules of one input
    for i, job in enumerate(jobs):
        alone = {**job, "output": str(llama.root / f"alone-{i}"), "quiet": True}
        {"ridge": ridge, "safedelta": safedelta}[alone.pop("method")](**alone)
        assert llama.weights(f"alone-{i}") == llama.weights(f"batch-{i}"), variants[i]


def test_task_and_keep_data(llama: Any) -> None:
    """Live, beside saved safe Grams, or all saved; the kept inputs' Grams are added up as they are."""
    task, keep = llama.tokens[:5], llama.tokens[5:9]
    for name, tokens in (("task", task), ("keep", keep)):
        (llama.root / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": t}) + "\n" for t in tokens))
    data = {"task_data": llama.root / "task.jsonl", "keep_data": llama.root / "keep.jsonl"}
    live = options(llama, "live", penalty=0.5, samples=4, **data)
    result = ridge(**live)
    assert manifest_of(result).inputs.keys() >= {"calibration", "task_data", "keep_data"}
    shared = {k: v for k, v in options(llama, "x", samples=4).items() if k in (*CALIBRATION, "aligned", "quiet")}
    calibrate(output=llama.root / "safe", **shared)
    ridge(**options(llama, "joined", factors=llama.root / "safe", penalty=0.5, samples=4, **data))
    calibrate(output=llama.root / "all", **shared, **data)
    ridge(**options(llama, "saved", factors=llama.root / "all", penalty=0.5))
    assert llama.weights("live") == llama.weights("joined") == llama.weights("saved")
    with pytest.raises(RequestError, match="they have their own"):
        ridge(**options(llama, "twice", factors=llama.root / "all", penalty=0.5, **data))
    by_leak = ridge(**options(llama, "leak", leak=0.02, samples=4, **data))
    assert manifest_of(by_leak).leak == pytest.approx(0.02, rel=0.02)


def test_task_data_is_the_weighted_formula(llama: Any) -> None:
    """All data sets are the whole file, so that the Grams are the test's own."""
    result, got = run(llama, "out", penalty=0.5, task_data=llama.data, keep_data=llama.data)
    before = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    after = llama.deltas(llama.adapter, got)
    for module, gram in llama.grams.items():
        assert_near(after[module], written(before[module], gram, 0.5, 2 * gram))
    assert manifest_of(result).leak == pytest.approx((1 / 1.5) ** 2, rel=0.1)  # P is H but for the damping


def test_safe_delta_by_leak(llama: Any) -> None:
    block = {"block_size": 20, "sub_block": 4}
    found = {}
    for leak in (0.02, 0.3):
        result = safedelta(**options(llama, f"leak-{leak}", percdamp=0.1, leak=leak), **block)
        manifest = manifest_of(result)
        assert manifest.leak is not None
        assert manifest.leak == pytest.approx(leak, rel=0.5)
        [found[leak]] = {module.strength for module in manifest.modules}
        again = safedelta(**options(llama, f"again-{leak}", percdamp=0.1, strength=found[leak]), **block)
        assert llama.weights(f"again-{leak}") == llama.weights(f"leak-{leak}")
        assert manifest_of(again).leak == manifest.leak
    assert found[0.02] < found[0.3]


def test_what_safe_delta_lets_through(llama: Any) -> None:
    result = safedelta(**options(llama, "out", percdamp=0.1, strength=2.0), block_size=20, sub_block=4)
    before = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    after = llama.deltas(llama.root / "out", llama.tensors("out"))
    for entry in manifest_of(result).modules:
        gram, module = llama.grams[entry.name], entry.name
        assert entry.energy == pytest.approx(energy(before[module], gram), rel=1e-3)
        assert entry.leak == pytest.approx(energy(after[module], gram) / energy(before[module], gram), rel=5e-3)


def test_verify_recomputes_it(llama: Any) -> None:
    run(llama, "out", leak=0.05)
    assert verify(llama.root / "out", inputs=True, recompute=3) == []


def test_an_interrupted_run_goes_on_with_the_penalty_it_found(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from safeshard.streamer.methods.ridge import Ridge

    run(llama, "whole", leak=0.05)
    calls = {"measure": 0, "edit": 0}
    measure, edit = Ridge.measure, Ridge.edit

    def failing(kind: str, original: Any, limit: int) -> Any:
        def wrapped(self: Any, module: Any) -> Any:
            calls[kind] += 1
            if calls[kind] == limit:
                raise KeyboardInterrupt
            return original(self, module)

        return wrapped

    for kind, original, limit in (("measure", measure, 9), ("edit", edit, 6)):
        monkeypatch.setattr(Ridge, kind, failing(kind, original, limit))
        with pytest.raises(KeyboardInterrupt):
            run(llama, "out", leak=0.05)
    run(llama, "out", leak=0.05)
    assert llama.weights("out") == llama.weights("whole")
    assert calls["measure"] < 2 * len(llama.grams) + 9
    assert load(llama.root / "out").modules == load(llama.root / "whole").modules


@pytest.mark.parametrize("asked", [{"penalty": 0.3}, {"leak": 0.1}])
def test_modules_that_are_no_decoder_linears(llama: Any, asked: dict[str, float]) -> None:
    folder = llama.make_adapter("with-head", target_modules=["q_proj", "lm_head"])
    _, got = run(llama, "kept", adapter=folder, **asked)
    tuned = load_file(folder / "adapter_model.safetensors")
    heads = [name for name in tuned if "lm_head" in name]
    assert heads
    assert all(torch.equal(got[name], tuned[name]) for name in heads)
    result, got = run(llama, "reverted", adapter=folder, **asked, rest="aligned")
    assert all((got[name] == 0).all() for name in heads if "lora_B" in name)
    [entry] = [m for m in manifest_of(result).modules if m.name == "lm_head"]
    assert (entry.decision, entry.leak) == ("reverted", None)


@pytest.mark.parametrize("given", [{"leak": 0.05}, {"penalty": 0.0}])
def test_a_delta_whose_squares_overflow_is_named(llama: Any, given: dict[str, float]) -> None:
    folder = llama.make_adapter("large")
    pairs = load_file(folder / ADAPTER)
    save_file({name: pair.float() * 1e15 for name, pair in pairs.items()}, folder / ADAPTER)
    with pytest.raises(RunError, match=r"large: model\..*: the delta is too large for fp32"):
        run(llama, "out", adapter=folder, **given)
    assert not (llama.root / "out").exists()


@pytest.mark.parametrize("rest", ["finetuned", "aligned"])
@pytest.mark.parametrize("method", [ridge, safedelta])
def test_a_leak_is_of_decoder_linears_whatever_else_an_adapter_has(llama: Any, method: Any, rest: str) -> None:
    """A head that --rest decides about waits for no strength, and changes none."""
    folder = llama.make_adapter("with-head", target_modules=["q_proj", "lm_head"])
    config, pairs = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / ADAPTER)
    (llama.root / "without").mkdir()
    (llama.root / "without/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    save_file({k: v for k, v in pairs.items() if "lm_head" not in k}, llama.root / "without" / ADAPTER)
    for name in ("with-head", "without"):
        method(**options(llama, f"out-{name}", adapter=llama.root / name, leak=0.05, rest=rest))
    got, alone = (load_file(llama.root / f"out-{name}" / ADAPTER) for name in ("with-head", "without"))
    assert all(torch.equal(got[name], alone[name]) for name in alone)
    decisions = {m.name: m.decision for m in load(llama.root / "out-with-head").modules}
    assert decisions["lm_head"] == {"finetuned": "kept", "aligned": "reverted"}[rest]
    method(**options(llama, "head", adapter=only_head(llama, pairs, config), leak=0.05, rest=rest))
    assert [m.name for m in load(llama.root / "head").modules] == ["lm_head"]


def only_head(llama: Any, pairs: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder: Path = llama.root / "only-head"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["lm_head"]}))
    save_file({name: pair for name, pair in pairs.items() if "lm_head" in name}, folder / ADAPTER)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_keeps_its_dtype(llama: Any, dtype: torch.dtype) -> None:
    folder = llama.make_adapter("half")
    file = folder / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)
    given = options(llama, "out", adapter=folder, penalty=0.3)
    del given["dtype"]
    ridge(**given)
    assert {t.dtype for t in llama.tensors("out").values()} == {dtype}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"leak": 0.1, "penalty": 1.0}, "either --leak or --penalty"),
        ({"leak": 0.0}, "leak"),
        ({"leak": 1.0}, "leak"),
        ({"penalty": -1.0}, "penalty"),
        ({"keep_data": "x"}, "--keep-data goes with --task-data"),
        ({"factors": "x", "calibration": "y"}, "calibration"),
        ({"factors": "x", "samples": 3}, "samples"),
    ],
)
def test_options_that_contradict(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ridge(**{"aligned": "a", "adapter": "b", "output": tmp_path / "out"} | given)


def test_factors_without_grams_are_refused(llama: Any) -> None:
    calibrate(**{k: v for k, v in options(llama, "factors", save="factors").items() if k != "adapter"})
    with pytest.raises(RequestError, match=r"Gram matrices.*calibrate again"):
        run(llama, "out", factors=llama.root / "factors")
    with pytest.raises(RequestError, match="Gram matrices"):
        safedelta(**options(llama, "out", factors=llama.root / "factors", percdamp=0.05))


def test_the_command_line(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[object] = ["ridge"]
    for name, value in options(llama, "out", leak=0.05).items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words if word != "--quiet"])
    assert not stop.value.code
    assert "leak 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["inspect", str(llama.root / "out")])
    assert "leak" in capsys.readouterr().out


def test_leaks_share_what_is_measured(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that differ in their leak alone measure each module once, and write what they write alone."""
    measured: Counter[tuple[str, str]] = Counter()
    for method in (Ridge, SafeDelta):

        def counted(self: Any, module: Any, original: Any = method.measure) -> list[float]:
            measured[self.method, module.name] += 1
            found: list[float] = original(self, module)
            return found

        monkeypatch.setattr(method, "measure", counted)
    jobs = [("ridge", {"leak": 0.3}), ("ridge", {"leak": 0.02})]
    jobs += [("safedelta", {"leak": leak, "percdamp": 0.1}) for leak in (0.3, 0.02)]
    jobs += [("safedelta", {"leak": 0.02, "percdamp": 0.1, "block_size": 8})]  # which asks for other curves
    asked = [
        {"method": method, **{k: str(v) if isinstance(v, Path) else v for k, v in (options(llama, "") | given).items()}}
        for method, given in jobs
    ]
    for number, job in enumerate(asked):
        job.pop("quiet", None)
        job["output"] = str(llama.root / f"shared-{number}")
    file = llama.root / "leaks.yaml"
    file.write_text(json.dumps({"jobs": asked}))
    batch(file, quiet=True)
    for name in llama.grams:
        each = {method: count for (method, module), count in measured.items() if module.endswith(name)}
        assert each == {"ridge": 1, "safedelta": 2}
    for number, job in enumerate(asked):
        alone = {**job, "output": str(llama.root / f"alone-{number}"), "quiet": True}
        {"ridge": ridge, "safedelta": safedelta}[alone.pop("method")](**alone)
        assert llama.weights(f"alone-{number}") == llama.weights(f"shared-{number}")


def test_a_leak_that_is_not_reached_is_said(llama: Any) -> None:
    result = safedelta(**options(llama, "out", percdamp=0.1, leak=0.9999), block_size=20, sub_block=4)
    found = manifest_of(result)
    (said,) = [warning for warning in found.warnings or () if warning.kind == "leak"]
    assert found.leak is not None
    assert said.text.startswith(f"--leak 0.9999 was not reached: {found.leak:.3g} of the delta's energy")
    reached = safedelta(**options(llama, "again", percdamp=0.1, leak=0.3), block_size=20, sub_block=4)
    assert not [warning for warning in manifest_of(reached).warnings or () if warning.kind == "leak"]
