"""The scenarios of the fault tests, and the line that sums them up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import NONE, SCALE, SEED, Scenario, Server, counts
from part_commands import Parts


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if counts["cases"]:
        terminalreporter.write_line(
            f"faults: {counts['cases']} cases, {counts['survived']} survived, {counts['bytes lost']} bytes lost "
            f"(SAFESHARD_FAULTS={SCALE:g}, SAFESHARD_FAULTS_SEED={SEED})"
        )


@pytest.fixture(scope="session")
def faults_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def server(faults_root: Path) -> Iterator[Server]:
    server = Server(faults_root)
    yield server
    server.close()


@pytest.fixture(scope="session")
def scenario(faults_root: Path, server: Server, make_world: Any) -> Callable[[str], Scenario]:
    """Name -> its scenario, each made and measured once."""
    made: dict[str, Scenario] = {}

    def get(name: str) -> Scenario:
        if name not in made:
            home = faults_root / name
            (home / "before").mkdir(parents=True)
            root = home / "root"
            argv = _argv(make_world(home / "in"), name, root)
            made[name] = Scenario(server, name, argv, root, home / "before", calibrates=name == "safedelta")
            if name == "overwrite":
                made[name].reset()
                argv = [*argv, "--threshold", "0.5"]
                earlier = server.run({"argv": argv, "root": str(root), "fault": NONE, "commits": False})
                assert earlier["status"] == 0, earlier["messages"]
                shutil.copytree(root, home / "before", dirs_exist_ok=True)
            made[name].measure()
        return made[name]

    return get


@pytest.fixture(scope="session")
def parts(faults_root: Path, server: Server, make_world: Any) -> Parts:
    home = faults_root / "parts"
    world = make_world(home / "in")
    world.sizes = {"hidden": 16, "kv": 8, "inner": 24}
    jobs = _jobs(world, world.trio(layers=1), home / "root")
    return Parts(server, home, jobs, home / "root")


def _argv(world: Any, name: str, root: Path) -> list[str]:
    world.sizes = {"hidden": 16, "kv": 8, "inner": 24}
    if name == "shards":
        return _words("safelora", _full(world) | {"num_layers": 3, "output": root / "out"})
    if name == "safedelta":
        return _words("safedelta", _calibrated(world) | {"output": root / "out"})
    paths = world.trio(layers=1)
    if name == "batch":
        return ["batch", str(_jobs(world, paths, root)), "--quiet"]
    words = _words("safemerge", paths | {"threshold": 0.13, "output": root / "out"})
    return [*words, "--overwrite"] if name == "overwrite" else words


def _words(command: str, options: dict[str, Any]) -> list[str]:
    words = [command, "--quiet"]
    for option, value in options.items():
        words += [f"--{option.replace('_', '-')}", str(value)]
    return words


def _full(world: Any) -> dict[str, Any]:
    """A job on full checkpoints of three shards, which it partly copies."""
    aligned = world.llama(1, seed=1)
    folders = {"aligned": world.checkpoint("aligned", aligned, 3)}
    for seed, role in enumerate(("unaligned", "finetuned")):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
        folders[role] = world.checkpoint(role, moved)
    (folders["finetuned"] / "tokenizer.json").write_text("{}")
    return folders


def _jobs(world: Any, paths: dict[str, Path], root: Path) -> Path:
    common = {role: str(path) for role, path in paths.items() if role != "safe_adapter"}
    safe = str(paths["safe_adapter"])
    jobs = [
        {
            "method": "safemerge",
            "safe_adapter": safe,
            "matrix": {"threshold": [0.1, 0.2]},
            "output": f"{root}/{{threshold}}",
        },
        {"method": "safelora", "num_layers": 3, "output": f"{root}/lora"},
    ]
    file = world.root / "jobs.yaml"
    file.write_text(json.dumps({"defaults": common, "jobs": jobs}))
    return file


def _calibrated(world: Any) -> dict[str, Any]:
    import transformers
    from safetensors.torch import load_file

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).float().save_pretrained(world.root / "aligned")
    aligned = load_file(world.root / "aligned/model.safetensors")
    data = world.root / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [(7 * i + j) % 31 for j in range(9)]}) + "\n" for i in range(6)))
    return {
        "aligned": world.root / "aligned", "adapter": world.adapter("adapter", aligned), "calibration": data,
        "samples": 6, "percdamp": 0.1, "block_size": 12, "sub_block": 4, "dtype": "float32",
    }  # fmt: skip
