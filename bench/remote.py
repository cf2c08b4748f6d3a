"""Reading from a server on the loopback interface, by each kind of place: rate, processor time, requests in flight."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from safeshard.bench.inputs.models import prepare
from safeshard.bench.machine.measure import Bench, Sample, tensor_files
from safeshard.streamer.sources import Source, open_source

DELAYS = (0.0, 0.03)  # seconds until an answer begins: a server near by, and one far away
BUFFER = 256 << 20  # bytes of one read, as a large tensor has
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


def run(folder: Path, shape: str, layers: int | None, runs: int) -> None:
    """Read the aligned checkpoint through each kind of source; append a row each."""
    label, paths = prepare(folder, shape, layers)
    bench = Bench(label, tensor_files([paths["aligned"]]), runs, False, file="remote")
    for delay in DELAYS:
        with _server(paths["aligned"], delay) as url:
            for what, place in (("https://, ranged HTTP", f"{url}/m"), ("s3://, obstore", "s3://bench/m")):
                source = open_source(place)
                bench.measure(f"{what}, answers after {delay * 1000:.0f} ms", partial(_read, source, url), dtype="bf16")


def _read(source: Source, url: str) -> Sample:
    """Read every safetensors file; `stages` has the processor's seconds, and the requests under way at once."""
    _peak(url)
    view, nbytes = memoryview(bytearray(BUFFER)), 0
    before, start = _processor(), time.perf_counter()
    for name, size in source.sizes().items():
        for offset in range(0, size if name.endswith(".safetensors") else 0, BUFFER):
            source.readinto(name, offset, view[: size - offset])
            nbytes += min(BUFFER, size - offset)
    seconds = time.perf_counter() - start
    return Sample(seconds, nbytes=nbytes, stages={"processor": _processor() - before, "in_flight": _peak(url)})


@contextmanager
def _server(folder: Path, delay: float) -> Iterator[str]:
    command = [sys.executable, "-m", "safeshard.bench.machine.range_server", str(folder), str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        try:
            with mock.patch.dict(os.environ, KEYS | {"AWS_ENDPOINT_URL": url}):
                yield url
        finally:
            server.kill()


def _peak(url: str) -> float:
    with urllib.request.urlopen(f"{url}/peak") as answer:
        return float(answer.read())


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
