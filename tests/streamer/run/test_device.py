"""How a run behaves towards a device, seen on one that is not there (`tests/kernels/standin.py`)."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from standin import DEVICE, Device
from standin import stand_in as bare_stand_in

from safeshard.manifests.errors import RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer import batch, safemerge
from safeshard.streamer import device as own
from safeshard.streamer.clock import Clock
from safeshard.streamer.inputs.read import GRAIN, Read, Step
from safeshard.streamer.pinned import host_memory
from safeshard.streamer.run.flow import stream
from safeshard.streamer.run.flow.steps import STRIP_BYTES
from safeshard.streamer.run.flow.stream import Buffers, run_steps

CPU = torch.device("cpu")


@contextmanager
def stand_in() -> Iterator[Device]:
    """A device of which the process has no streams and no memory yet, and has none afterwards."""
    with bare_stand_in() as device:
        for lent in (own._streams, own._landings):
            lent._free.clear()
        yield device
        for lent in (own._streams, own._landings):
            lent._free.clear()


def run_some(steps: int, workers: int = 4, compute: Callable[..., None] = lambda *_: None, **more: Any) -> None:
    run_steps(
        [Step(str(n)) for n in range(steps)], compute, buffers=Buffers(1 << 30), clock=Clock(), workers=workers, **more
    )


# What a run does.


@pytest.mark.parametrize("threshold", [-2.0, 2.0])  # all kept, all merged
def test_safemerge_on_a_device_decides_and_writes_alike(
    world: Any, tmp_path: Path, load_tensors: Callable[..., Any], threshold: float
) -> None:
    trio = world.trio(layers=1)
    expected = safemerge(**trio, output=tmp_path / "cpu", threshold=threshold, quiet=True)
    with stand_in() as device:
        result = safemerge(**trio, output=tmp_path / "device", threshold=threshold, quiet=True, device="cuda:1")
    assert result.manifest.tool.device == "stand-in"
    assert [m.decision for m in result.manifest.modules] == [m.decision for m in expected.manifest.modules]
    written, other = load_tensors(tmp_path / "device"), load_tensors(tmp_path / "cpu")
    assert written.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-6)
    # A step waits for its cosines, on which all depends, and for what it writes.
    waits = Counter(wait.partition(" at ")[0] for wait in device.waits)
    assert waits == {"copy down": 7, "synchronize": 7}, chr(10).join(device.waits)
    assert device.streams <= 4


def launched(world: Any, count: int, method: str, output: str, **options: Any) -> tuple[int, list[Any]]:
    """Launches of a batch of so many adapters on the device, and the manifests."""
    jobs = [
        {"method": method, "adapter": f"{world.root}/a{k}", "output": f"{world.root}/{output}-{k}"} | options
        for k in range(count)
    ]
    file = world.root / f"{output}.yaml"
    file.write_text(json.dumps({"jobs": jobs}))  # which is YAML, too
    with stand_in() as device:
        results = batch(file, device="cuda:1", quiet=True)
    return len(device.launches), [result.manifest for result in results]


@pytest.mark.parametrize(
    ("method", "threshold", "dtype"),
    [("safemerge", 2.0, "bfloat16"), ("safemerge", -2.0, "float32"), ("safelora", 2.0, "bfloat16")],
)
def test_a_module_takes_as_many_launches_whatever_the_batch(
    world: Any, method: str, threshold: float, dtype: str
) -> None:
    """Gates, merges, what is left of the deltas and what is written: few launches, and each output as if alone."""
    trio = {role: str(place) for role, place in world.trio(layers=1).items()}
    for k in range(5):
        world.adapter(f"a{k}", world.llama(1, seed=1), seed=10 + k)
    wanted = ("aligned", "unaligned") + (("safe_adapter",) if method == "safemerge" else ())
    options = {role: trio[role] for role in wanted} | {"threshold": threshold, "dtype": dtype}
    few, _ = launched(world, 2, method, "few", **options)
    many, together = launched(world, 5, method, "many", **options)
    assert few == many < 100 * len(together[0].modules)
    _, [alone] = launched(world, 1, method, "alone", **options)
    assert alone.modules == together[0].modules
    assert alone.tensors == together[0].tensors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["safemerge", "safelora"])
def test_a_step_of_64_adapters_takes_under_100_launches(world: Any, method: str) -> None:
    """All of one module's step, from its gates to what is written of it."""
    weights = {name: t for name, t in world.llama(1, seed=1).items() if "_proj" not in name or "down_proj" in name}
    moved = {name: t + 0.3 * torch.randn_like(t) for name, t in weights.items()}
    common = {"aligned": world.checkpoint("aligned", weights), "unaligned": world.checkpoint("unaligned", moved)}
    if method == "safemerge":
        common["safe_adapter"] = world.adapter("safe", weights, seed=3, target_modules=["down_proj"])
    for k in range(64):
        world.adapter(f"a{k}", weights, seed=10 + k, target_modules=["down_proj"])
    options = {role: str(place) for role, place in common.items()} | {"threshold": 2.0, "dtype": "bfloat16"}
    launches, manifests = launched(world, 64, method, "many", **options)
    assert [len(manifest.modules) for manifest in manifests] == [1] * 64
    assert {m.decision for manifest in manifests for m in manifest.modules} <= {"merged", "projected"}
    assert launches < 100


# Workers.


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_a_worker_that_cannot_start_ends_the_run(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    @contextmanager
    def failing(_: object) -> Iterator[None]:
        raise RuntimeError("no stream")
        yield

    monkeypatch.setattr(stream, "own_stream", failing)
    done: list[str] = []
    with pytest.raises(RuntimeError, match="no stream"):
        run_some(steps, compute=lambda step, _: done.append(step.name))
    assert not done


def test_a_thread_that_the_system_refuses_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("worker"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_some(30)


def test_streams_last_from_one_layer_to_the_next() -> None:
    with stand_in() as device:
        for _ in range(5):
            run_some(8, workers=3, device=DEVICE)
        assert 1 <= device.streams <= 3


# Memory of the host.


def test_pinned_memory_is_of_the_size_asked_and_given_back() -> None:
    with stand_in() as device:
        memory = host_memory(257 * GRAIN + 1, pinned=True)
        assert list(device.registered.items()) == [(memory.data_ptr(), 257 * GRAIN + 1)]
        view = memory[4:8].view(torch.int32)
        del memory
        view.fill_(7)  # a view keeps it
        assert device.registered
        del view
        assert not device.registered


def test_memory_that_the_driver_does_not_pin_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with stand_in() as device:
        device.refuses_to_pin = True
        assert host_memory(GRAIN, pinned=True).fill_(3).sum() == 3 * GRAIN
        assert "does not pin 1048576 bytes" in caplog.text


def test_buffers_of_a_device_are_counted_to_the_byte() -> None:
    with stand_in() as device:
        buffers = Buffers(1 << 30, pinned=True)
        refs = [TensorRef(str(n), "U8", (n * GRAIN + 3,), "f", 0, n * GRAIN + 3) for n in (1, 256, 300)]
        steps = [Step(ref.name, {ref.name: Read(None, ref)}) for ref in refs]  # type: ignore[arg-type]
        taken = [buffers.take(step) for step in steps]
        assert sum(device.registered.values()) == buffers.used == (2 + 257 + 301) * GRAIN
        assert sum(device.registered.values()) == sum(buffer.numel() for buffer in taken)


def test_results_land_in_memory_that_a_step_has_asked_for() -> None:
    assert own.LANDING_BYTES <= STRIP_BYTES


def test_results_arrive_in_order_with_a_wait_for_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "LANDING_BYTES", 1024)
    seen: list[Any] = []
    with stand_in() as device:
        first, second = torch.arange(100.0).to(DEVICE), torch.arange(500.0).to(DEVICE)
        device.waits.clear()
        arrivals = own.Arrivals(DEVICE)
        with arrivals.landing():
            arrivals.add(first, torch.bfloat16, lambda x: seen.append(x.clone()))
            arrivals.then(lambda: seen.append("between"))
            arrivals.add(second, torch.float32, lambda x: seen.append(x.clone()))
            arrivals.then(lambda: seen.append("end"))
        assert len(device.waits) == 3  # 200 bytes, 1024 and 976
    assert [x for x in seen if isinstance(x, str)] == ["between", "end"]
    pieces = [x for x in seen if not isinstance(x, str)]
    assert torch.equal(pieces[0], torch.arange(100.0).bfloat16())
    assert torch.equal(torch.cat(pieces[1:]), torch.arange(500.0))
    assert seen[1] == "between"
    assert seen[-1] == "end"


# Memory of the device.


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("HIP error: out of memory"),
    ],
)
def test_every_library_runs_out_of_memory(error: Exception) -> None:
    assert own.is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes do not match"), MemoryError(), ValueError("out of memory"), RunError("x: out of memory")],
)
def test_other_errors_are_others(error: Exception) -> None:
    assert not own.is_out_of_memory(error)


def test_another_try_is_alone() -> None:
    """It begins when all others have ended, and none begins before it has."""
    running, together = Counter[str](), list[int]()
    full = threading.Barrier(3)

    def work(name: str) -> None:
        def first() -> None:
            running["all"] += 1
            full.wait(10)
            running["all"] -= 1
            if name == "0":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")

        def again(why: str) -> None:
            assert why == "CUDA out of memory."
            together.append(running["all"])

        own.relieved(CPU, first, again)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert together == [0]


def test_twice_without_memory_is_an_error_with_a_remedy() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    with pytest.raises(RunError, match=r"layer\.3: the device is out of memory: CUDA error: CUBLAS") as raised:
        own.tried_twice(CPU, "layer.3", work)
    assert "--device cpu" in str(raised.value.remedy)
    assert len(calls) == 2


# Precision.


@pytest.mark.parametrize("given", ["medium", "high", "highest"])
def test_products_are_exact_whatever_was_set(given: str) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(given)
        with own.exact_products(), own.exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            torch.testing.assert_close((x @ x).double(), x.double() @ x.double(), rtol=0, atol=1e-4)
        assert torch.get_float32_matmul_precision() == given
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_run_has_the_same_bytes_whatever_precision_was_set(world: Any, tmp_path: Path) -> None:
    world.sizes = {"hidden": 96, "kv": 48, "inner": 160}
    trio = world.trio(layers=1)
    expected = safemerge(**trio, output=tmp_path / "one", threshold=2.0, quiet=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = safemerge(**trio, output=tmp_path / "two", threshold=2.0, quiet=True)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [m.cosine for m in result.manifest.modules] == [m.cosine for m in expected.manifest.modules]
    assert result.manifest.tensors == expected.manifest.tensors
