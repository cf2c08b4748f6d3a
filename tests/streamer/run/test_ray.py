"""Parts as tasks of a Ray cluster: what they ask for; two nodes on this machine, of which one is killed underway."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safeshard.manifests.errors import RequestError
from safeshard.streamer import batch
from safeshard.streamer.options import RunOptions
from safeshard.streamer.run.ray_engine import PROCESS_BYTES, _Board, _Relay, resources_of_a_part

GIB = 1 << 30
NOT_STARTED = 77  # exit status of the program below where Ray itself does not come up
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: safeshard[ray]")

# Another process, so that nothing of Ray outlives a test, and none waits for it for ever.
PROGRAM = f"""
import contextlib, io, json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from safeshard.streamer import batch

jobs, root = sys.argv[1], Path(sys.argv[2])
store = {{"object_store_memory": 100 << 20}}
try:
    cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False, **store}})
    other = cluster.add_node(num_cpus=1, **store)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
except Exception as error:
    print(error, file=sys.stderr)
    sys.exit({NOT_STARTED})
underway = []

def strike():
    first = sorted(json.loads(Path(jobs).read_text())["jobs"], key=lambda job: job["output"])[0]["output"]
    begun = []
    while len(begun) < 2:  # one a node
        time.sleep(0.01)
        journals = Path(first + ".parts").glob("*/journal.jsonl")
        begun = [path for path in journals if not (path.parent / "part.json").exists()]
    underway.extend(begun)
    cluster.remove_node(other, allow_graceful=False)

threading.Thread(target=strike, daemon=True).start()
with contextlib.redirect_stdout(io.StringIO()) as said:
    batch(jobs, engine="ray", parts=4, memory="256MiB", quiet=True)
deadline = time.monotonic() + 120  # Ray learns of a lost node by and by, and may print of it here meanwhile
while (alive := sum(node["Alive"] for node in ray.nodes())) > 1 and time.monotonic() < deadline:
    time.sleep(0.1)
Path(sys.argv[3]).write_text(json.dumps([len(underway), alive, said.getvalue()]))
ray.shutdown()
cluster.shutdown()
"""


def node(cpus: float, gpus: float = 0, memory: float = 64 * GIB) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": memory, "object_store_memory": 1e9}


@pytest.mark.parametrize(
    ("nodes", "options", "asked", "slots"),
    [
        ([node(8), node(4), node(0)], {}, {"num_gpus": 0, "num_cpus": 4}, 2),  # a head without cores takes none
        ([node(64, 8)], {}, {"num_gpus": 1, "num_cpus": 8}, 8),  # the GPUs of a host are parts of their own
        ([node(2, 4), node(32, 1), node(16)], {}, {"num_gpus": 1, "num_cpus": 1}, 5),
        ([node(64, 8), node(16)], {"device": "cpu"}, {"num_gpus": 0, "num_cpus": 16}, 2),
        ([node(8, memory=2 * GIB), node(4)], {}, {"num_gpus": 0, "num_cpus": 4}, 1),  # of which one has the memory
    ],
)
def test_what_a_part_asks_for(
    nodes: list[dict[str, float]], options: dict[str, Any], asked: dict[str, float], slots: int
) -> None:
    run_options = RunOptions(memory=2 * GIB, **options)
    assert resources_of_a_part(nodes, run_options) == (asked | {"memory": 2 * GIB + PROCESS_BYTES}, slots)


def test_a_cluster_that_cannot_take_a_part_is_refused() -> None:
    with pytest.raises(RequestError, match=r"a node with 65\.5\d GB of memory, got at most 10\.00 GB"):
        resources_of_a_part([node(8, memory=10e9)], RunOptions(memory=60 * GIB))
    with pytest.raises(RequestError, match="--device: expected a GPU in the cluster, got none"):
        resources_of_a_part([node(8)], RunOptions(device="cuda"))


def test_the_progress_of_all_parts_is_one() -> None:
    board = _Board()
    actor = SimpleNamespace(tell=SimpleNamespace(remote=board.tell))
    with _Relay(actor, 1, 100, True) as one, _Relay(actor, 2, 50, True) as other:
        assert board.read() == (150, 0, "")
        one.done("model.layers.3.x", 30)
        other.extend(10)
        other.done("model.layers.4.x", 60)
    assert board.read()[:2] == (160, 90)
    with _Relay(actor, 2, 20, True):  # started again elsewhere, with less to do
        assert board.read()[:2] == (120, 30)


def test_without_ray_the_extra_is_named(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'safeshard\[ray\]'"):
        batch(jobs_file(world, tmp_path, 1), engine="ray")


def jobs_file(world: Any, folder: Path, count: int) -> Path:
    paths = {role: str(path) for role, path in world.trio(layers=4).items()}
    common = {role: paths[role] for role in ("aligned", "adapter")}
    jobs = [
        {"method": "scale", "factor": (number + 1) / 99, "output": str(folder / f"out/scale-{number:02}")}
        for number in range(count)
    ]
    jobs.append({"method": "safelora", "unaligned": paths["unaligned"], "num_layers": 6, "output": f"{folder}/out/x"})
    file = folder / "jobs.json"
    file.write_text(json.dumps({"jobs": [common | job for job in jobs]}))
    return file


def contents(root: Path) -> dict[str, bytes]:
    """All weights and cards: what differs from run to run is in the manifests."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@needs_ray
@pytest.mark.slow
def test_a_node_that_is_killed_underway_costs_no_byte(world: Any, tmp_path: Path) -> None:
    file = jobs_file(world, tmp_path, 40)
    batch(file, quiet=True)
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    told = tmp_path / "told.json"
    argv = [sys.executable, "-c", PROGRAM, str(file), str(tmp_path / "out"), str(told)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode == NOT_STARTED:
        pytest.skip(f"Ray does not start here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    assert json.loads(told.read_text()) == [2, 1, ""], done.stderr  # parts underway, nodes left, what it said
    assert contents(tmp_path / "out") == whole
