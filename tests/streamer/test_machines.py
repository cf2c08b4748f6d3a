"""What files, places and streams may do to the machine: nothing is fetched or run, nothing blocks, no secret stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from safeshard.manifests import RequestError, bounded, manifest_text, schema
from safeshard.manifests.safetensors_header import HeaderError, read_header
from safeshard.streamer import api, calibrate, safemerge, scale, score
from safeshard.streamer.calibration.data import prompts
from safeshard.streamer.calibration.model import building
from safeshard.streamer.inputs import headers
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.inputs.names import patterns
from safeshard.streamer.plan.request import yaml_file
from safeshard.streamer.plan.request.jobs_file import read_jobs
from safeshard.streamer.sources import open_source, read_json

GOLDEN = Path(__file__).parent.parent / "goldens/llama/aligned/config.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the configuration of a tiny Llama."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(GOLDEN.read_bytes())
    return folder


CODE: list[dict[str, Any]] = [
    {"attn_implementation": "evil/kernels"},
    {"_attn_implementation": "evil/kernels:forward"},
    {"_attn_implementation_internal": "evil/kernels@main"},
    {"attn_implementation": {"": "paged|evil/kernels"}},
    {"experts_implementation": "evil/kernels"},
    {"auto_map": {"AutoConfig": "evil/code--x.Config", "AutoModelForCausalLM": "x.Model"}},
    {"kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernels:RMSNorm"}}, "use_kernels": True},
]


@pytest.mark.parametrize("keys", CODE)
def test_no_key_of_a_config_names_code(model: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loader of kernels is never asked, nor is code of a repository; also where keys are nested."""
    from transformers.integrations import hub_kernels

    asked: list[Any] = []

    def loader(*args: Any, **kwargs: Any) -> None:
        asked.append(args)

    for name in ("load_and_register_attn_kernel", "lazy_load_kernel", "get_kernel"):
        monkeypatch.setattr(hub_kernels, name, loader)
        if hasattr(transformers.modeling_utils, name):
            monkeypatch.setattr(transformers.modeling_utils, name, loader)
    plain = json.loads((model / "config.json").read_text())
    nested = plain | {"per_layer": [keys], "other": {"deep": keys}}
    for config in (plain | keys, nested):
        (model / "config.json").write_text(json.dumps(config))
        read = building.read_config(model)
        assert read._attn_implementation is None
        assert not hasattr(read, "auto_map")
        assert "evil" not in json.dumps(read.to_dict())
        built = building.build(model, read, torch.float32)
        assert built.config._attn_implementation in ("sdpa", "eager")
    assert asked == []


def test_compiled_kernels_are_not_fetched_from_the_hub() -> None:
    """Whatever architecture a config names: transformers would fetch those of some when they are built."""
    code = "from safeshard.streamer.extras import require_transformers; require_transformers()\n"
    code += "from transformers.integrations import hub_kernels; print(hub_kernels._kernels_enabled)"
    env = {key: value for key, value in os.environ.items() if key != "USE_HUB_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["False"]


READERS: dict[str, Callable[[Path], Any]] = {
    "a manifest": lambda path: schema.load(path),
    "an output": lambda path: api.verify(path.parent),
    "a report": lambda path: api.report(path.parent),
    "jobs": read_jobs,
    "calibration": lambda path: prompts.load_prompts(path, path.parent, samples=1),
    "a configuration": lambda path: building.read_config(path.parent),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["/dev/zero", "/dev/tty", "/dev/ptmx", "/proc/self/mem", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, reader: str, kind: str) -> None:
    """A link to a device, to a terminal, a pipe that nobody writes to."""
    path = tmp_path / ("config.json" if reader == "a configuration" else "manifest.json")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    refused: list[Any] = []

    def read() -> None:
        try:
            refused.extend(READERS[reader](path))  # what `verify` finds
        except RequestError as error:
            refused.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(refused) == 1


def test_a_file_that_grows_is_read_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 11)
    with pytest.raises(bounded.TooLargeError):
        bounded.read_regular(tmp_path / "x", 10)
    assert bounded.read_regular(tmp_path / "x", 11) == b"x" * 11
    with pytest.raises(bounded.TooLargeError):  # says that it has no bytes
        bounded.read_regular(Path("/proc/self/smaps"), 10)


def header(text: bytes) -> Callable[[], Any]:
    raw = len(text).to_bytes(8, "little") + text
    return lambda: read_header("x", len(raw), lambda start, stop: raw[start:stop])


def test_values_are_counted_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes alone bound nothing: `[]` takes two of a file and sixty of memory."""

    def parsed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was parsed")

    many = b"[" + b"[]," * bounded.MAX_VALUES + b"[]]"
    (tmp_path / "config.json").write_bytes(many)
    (tmp_path / "manifest.json").write_bytes(b"[" + b"[]," * manifest_text.MAX_MANIFEST_VALUES + b"[]]")
    monkeypatch.setattr(json, "loads", parsed)
    with pytest.raises(HeaderError, match="more than 3000000 values"):
        header(many)()
    with pytest.raises(RequestError, match="more than 3000000 values"):
        read_json(open_source(tmp_path), "config.json")
    with pytest.raises(RequestError, match="more than 6000000 values"):
        schema.load(tmp_path)


def test_tensors_are_bounded(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one file and of all."""
    folder = world.checkpoint("many", world.llama(3), 3)
    monkeypatch.setattr(headers, "MAX_TENSORS", 5)
    with pytest.raises(RequestError, match="at most 5 tensors in all files"):
        open_checkpoint(open_source(folder))
    entries = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(bounded.MAX_TENSORS + 2)}
    with pytest.raises(HeaderError, match="at most 200000 tensors"):
        header(json.dumps(entries).encode())()


def test_of_a_million_wrong_entries_the_first_is_an_error() -> None:
    document = {"tensors": [0] * 1000, "modules": [{}] * 1000, "files": [{"name": 1}] * 1000, "fallbacks": [[]] * 1000}
    with pytest.raises(RequestError) as refused:
        schema.Manifest.from_json(json.dumps(document))
    assert len(refused.value.offences) < 30


def test_wrong_records_are_counted_and_the_first_shown(model: Path) -> None:
    (model / "data.jsonl").write_text("{}\n" * 50 + '{"input_ids": [1]}\n')
    with pytest.raises(RequestError) as refused:
        prompts.load_prompts(model / "data.jsonl", model, samples=1)
    (offence,) = refused.value.offences
    assert offence.what == "50 of 51 records (lines 1, 2, 3, ...)"


def test_a_json_list_says_the_same_as_json_lines(model: Path) -> None:
    records = [{"input_ids": [number % 30 + 1, 2]} for number in range(20)]
    (model / "lines.jsonl").write_text("\ufeff" + "\r\n\n".join(map(json.dumps, records)))
    (model / "list.json").write_text(json.dumps(records, indent=1))
    lines, items = (prompts.load_prompts(model / name, model, samples=7) for name in ("lines.jsonl", "list.json"))
    assert (lines.tokens, lines.count) == (items.tokens, items.count)
    for text in ("[1,]", "[", "[1 2]", "[1] x", "[,1]", "[]x"):
        (model / "bad.json").write_text(text)
        with pytest.raises(RequestError):
            prompts.load_prompts(model / "bad.json", model, samples=1)


@pytest.mark.parametrize(
    "text",
    [
        "jobs: 1" + ":1" * 100_000,
        "jobs: 0x" + "F" * 10_000,
        "jobs: " + "9" * 10_000,
        "jobs: 1." + "0" * 10_000,
        "jobs: [" + "[]," * 200_000 + "]",
    ],
)
def test_yaml_that_would_take_for_ever(tmp_path: Path, text: str) -> None:
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(RequestError, match="valid YAML"):
        read_jobs(tmp_path / "jobs.yaml")


def test_a_job_with_a_giant_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_file, "MAX_NUMBER_CHARS", 10**6)
    (tmp_path / "jobs.yaml").write_text(
        f"jobs: [{{method: scale, aligned: a, adapter: b, output: o, factor: 0x{'F' * 5000}}}]"
    )
    with pytest.raises(RequestError, match="factor"):
        read_jobs(tmp_path / "jobs.yaml")
    with pytest.raises(RequestError, match="bits"):
        scale(aligned="a", adapter="b", output="o", factor=10**5000)


def test_ten_thousand_jobs_are_taken(tmp_path: Path) -> None:
    jobs = [
        {"method": "scale", "aligned": "a", "adapter": f"b{n}", "factor": 0.5, "output": f"o{n}"} for n in range(5000)
    ]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    assert len(read_jobs(tmp_path / "jobs.yaml")) == 5000


def test_patterns_have_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process waits for, on a machine that is busy, does not count."""
    clock = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(patterns.time, "monotonic", lambda: float(next(clock)))
    pattern = patterns.Patterns("x").compile("a+")
    assert all(pattern.fullmatch("aaa") for _ in range(10))


@pytest.mark.parametrize(
    "place", ["s3://bucket/x", "hf://me/x", "gs://b/x", "https://user:secret@host/x", "S3://b/x", "sftp://h/x"]
)
def test_a_place_afar_for_what_stays_here_is_refused(world: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors, tables and pages go to this machine's disk, given as text or as a path; no folder `s3:` comes of it."""
    monkeypatch.chdir(world.root)
    paths = world.trio()
    pair = {"aligned": paths["aligned"], "unaligned": paths["unaligned"], "adapter": paths["adapter"]}
    before = sorted(world.root.iterdir())
    for each in (place, Path(place)):
        for call in (
            lambda each=each: calibrate(aligned=paths["aligned"], output=each),
            lambda each=each: score(**pair, output=each),
            lambda each=each: api.report(paths["aligned"], file=each),
        ):
            with pytest.raises(RequestError, match="a local folder: write it there, then copy it") as refused:
                call()
            assert "secret" not in str(refused.value)
    assert sorted(world.root.iterdir()) == before


def test_an_output_at_a_place_that_is_not_written_to_is_refused(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.root)
    paths = world.trio()
    before = sorted(world.root.iterdir())
    for place in ("https://user:secret@host/x", "memory://x", Path("ftp://host/x")):
        with pytest.raises(RequestError, match="a local folder, s3://bucket/prefix") as refused:
            safemerge(**paths, output=place)
        assert "secret" not in str(refused.value)
    assert sorted(world.root.iterdir()) == before


def test_calibration_data_at_a_url_is_read_and_its_secrets_stay_out(model: Path) -> None:
    fsspec.filesystem("memory").pipe("/calibration/data.jsonl", b'{"input_ids": [1, 2]}\n')
    found = prompts.load_prompts("memory://calibration/data.jsonl", model, samples=1)
    assert found.tokens == [[1, 2]]
    with pytest.raises(RequestError) as refused:
        prompts.load_prompts("http://key:secret@127.0.0.1:9/data.jsonl?token=secret", model)
    assert "secret" not in str(refused.value)


def test_a_file_url_is_a_path(world: Any) -> None:
    paths = world.trio()
    result = scale(
        aligned=paths["aligned"], adapter=paths["adapter"], factor=0.5, output=f"file://{world.root}/out", quiet=True
    )
    assert (world.root / "out/manifest.json").is_file()
    assert result.output == world.root / "out"


def test_places_are_shown_without_their_secrets(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an output's name, in adapter_config.json and in the model card."""
    url = "https://user:hunter2@host/adapters/alice?token=hunter2"
    file = world.root / "jobs.yaml"
    job = {"method": "scale", "aligned": "a", "adapter": url, "factor": 0.5, "output": "out/{adapter}"}
    file.write_text(json.dumps({"jobs": [job]}))
    (read,) = read_jobs(file)
    assert str(read.output) == "out/alice"
    paths = world.trio()
    world.edit_config(paths["adapter"], base_model_name_or_path=url)
    scale(aligned=paths["aligned"], adapter=paths["adapter"], factor=0.5, output=world.root / "out", quiet=True)
    for path in (world.root / "out").iterdir():
        assert b"hunter2" not in path.read_bytes(), path.name


def run(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A shell command in which `safeshard` is this one."""
    script = f'safeshard() {{ "{sys.executable}" -m safeshard "$@"; }}; set -o pipefail; {words}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_streams_end_as_users_expect(world: Any) -> None:
    """Who has read enough ends nothing; a full disk behind standard output is named."""
    paths = world.trio()
    words = f"safeshard scale --aligned {paths['aligned']} --adapter {paths['adapter']} --factor 0.5 --output"
    done = run(f"{words} out | true; echo ${{PIPESTATUS[0]}}", world.root)
    assert (done.stdout.strip(), done.stderr) == ("0", "")
    assert (world.root / "out/manifest.json").is_file()
    done = run("safeshard inspect out | head -1", world.root)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(f"{words} full > /dev/full", world.root)
    assert done.returncode == 1
    assert "standard output" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_linux_alone_has_is_not_needed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: no reservation of space, no copies inside the kernel, no advice, no affinity."""
    for name in ("posix_fallocate", "copy_file_range", "posix_fadvise", "sched_getaffinity", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    aligned = world.llama(2)
    folders = {"aligned": world.checkpoint("aligned", aligned, 2)}
    folders["finetuned"] = world.checkpoint("tuned", {n: t + 0.1 for n, t in aligned.items()})
    save_file({"x": torch.zeros(1)}, world.root / "unused.safetensors")
    scale(**folders, factor=0.5, output=world.root / "out", quiet=True)
    assert api.verify(world.root / "out") == []


@pytest.mark.parametrize(
    "text",
    [
        '{"method": {"options": {"a": [' + '{"a":0},' * 200_000 + "0]}}}",
        '{"method": "' + "x" * 1_000_001 + '"}',
        '{"modules": "\\ud83d\\ude00' + "x" * 33_000_000 + '"}',
    ],
)
def test_what_would_grow_in_a_manifest_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="more than"):
        schema.Manifest.from_json(text)
