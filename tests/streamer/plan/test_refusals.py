"""Bad input through the command line: one clear message, the right exit status, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.streamer import scale
from safeshard.streamer.cli.app import main

INDEX = "model.safetensors.index.json"
WEIGHTS = "adapter_model.safetensors"
UP = "model.layers.1.mlp.up_proj"
LORA = f"base_model.model.{UP}.lora_"


class Case:
    """Valid inputs of every method, which a test then spoils, and the commands that take them."""

    def __init__(self, world: Any) -> None:
        self.world, self.root = world, world.root
        self.paths: dict[str, Path] = world.trio(shards=3)
        aligned = {n: t for f in sorted(self.paths["aligned"].glob("*.safetensors")) for n, t in load_file(f).items()}
        for seed, role in enumerate(("finetuned", "safe-full")):
            generator = torch.Generator().manual_seed(seed)
            moved = {n: t + 0.1 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
            self.paths[role] = world.checkpoint(role, moved)

    def argv(self, command: str, **changes: object) -> list[str]:
        p = self.paths
        adapters = {"adapter": p["adapter"], "unaligned": p["unaligned"]}
        full = {"finetuned": p["finetuned"], "unaligned": p["unaligned"], "safe": p["safe-full"]}
        options: dict[str, object] = {
            "safemerge": adapters | {"safe-adapter": p["safe_adapter"]},
            "safemerge-full": full,
            "safelora": adapters | {"threshold": 0.2},
            "scale": {"adapter": p["adapter"], "factor": 0.5},
            "score": adapters,
        }[command] | {"aligned": p["aligned"], "output": self.root / ("out.csv" if command == "score" else "out")}
        given = [(k.replace("_", "-"), v) for k, v in (options | changes).items() if v is not None]
        return [command.removesuffix("-full"), "--quiet", *(s for k, v in given for s in (f"--{k}", str(v)))]

    def rewrite(self, folder: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> str:
        """Replace the tensors of a folder's first safetensors file that holds layer 1's up_proj; return its name."""
        for file in sorted(self.paths[folder].glob("*.safetensors")):
            tensors = load_file(file)
            if any(UP in name for name in tensors):
                save_file(dict(change(tensors)), file, {"format": "pt"})
                return str(file)
        raise AssertionError(folder)

    def edit_json(self, folder: str, name: str, change: Callable[[Any], Any]) -> None:
        path = self.paths[folder] / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture
def case(world: Any) -> Case:
    return Case(world)


@pytest.fixture
def refused(case: Case, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; checks status and traces, returns the message."""

    def check(argv: list[str], *named: str, status: int = 2) -> str:
        before = {p: p.stat().st_mtime_ns for p in case.root.rglob("*")}
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (status, ""), err
        assert "Traceback" not in err
        for text in named:
            assert text in err, err
        assert not (case.root / "out").exists()
        if status == 2:
            assert {p: p.stat().st_mtime_ns for p in case.root.rglob("*")} == before
        return err

    return check


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: tensor}


def test_a_weight_that_the_unaligned_model_lacks(case: Case, refused: Any) -> None:
    case.rewrite("unaligned", without(f"{UP}.weight"))
    case.edit_json("unaligned", INDEX, lambda i: {"weight_map": without(f"{UP}.weight")(i["weight_map"])})
    for command in ("safemerge", "safemerge-full", "safelora", "score"):
        message = refused(case.argv(command), str(case.paths["unaligned"]), f"{UP}.weight", "missing", "expected")
        assert len(message.splitlines()) == 1


def test_a_linear_that_a_full_checkpoint_lacks_is_named_once(case: Case, refused: Any) -> None:
    case.rewrite("finetuned", without(f"{UP}.weight"))
    message = refused(case.argv("safemerge-full"), str(case.paths["finetuned"]), f"{UP}.weight", "missing")
    assert len(message.splitlines()) == 1


def test_a_tensor_that_a_full_checkpoint_lacks_or_adds(case: Case, refused: Any) -> None:
    case.rewrite("finetuned", lambda t: without("model.norm.weight")(t) | {"model.extra.weight": torch.zeros(2)})
    refused(
        case.argv("safemerge-full"), "2 problems", str(case.paths["finetuned"]), "model.norm.weight", "missing",
        "model.extra.weight", "extra",
    )  # fmt: skip


def test_half_a_pair(case: Case, refused: Any) -> None:
    case.rewrite("adapter", without(f"{LORA}B.weight"))
    refused(case.argv("safemerge"), WEIGHTS, UP, "lora_B")


def test_a_module_that_the_config_targets_and_the_weights_lack(case: Case, refused: Any) -> None:
    case.rewrite("safe_adapter", without(f"{LORA}A.weight", f"{LORA}B.weight"))
    refused(case.argv("safemerge"), str(case.paths["safe_adapter"]), UP, "none")


@pytest.mark.parametrize("role", ["unaligned", "finetuned", "safe-full"])
def test_another_shape(case: Case, refused: Any, role: str) -> None:
    case.rewrite(role, replaced(f"{UP}.weight", torch.zeros(41, 24)))
    refused(case.argv("safemerge-full"), str(case.paths[role]), f"{UP}.weight", "[40, 24]", "[41, 24]")


def test_another_vocabulary_where_the_job_computes_with_it(case: Case, refused: Any) -> None:
    """The adapter trains the head, so the gate takes the unaligned model's."""
    pair = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 24),
        "base_model.model.lm_head.lora_B.weight": torch.ones(32, 4),
    }
    case.rewrite("adapter", lambda tensors: tensors | pair)
    case.edit_json(
        "adapter", "adapter_config.json", lambda c: c | {"target_modules": [*c["target_modules"], "lm_head"]}
    )
    file = next(f for f in case.paths["unaligned"].glob("*.safetensors") if "lm_head.weight" in load_file(f))
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(40, 24)}, file)
    refused(case.argv("safelora"), "lm_head.weight", "[32, 24]", "[40, 24]", "computes with", "one vocabulary")


def test_another_width_of_the_embeddings(case: Case, refused: Any) -> None:
    wide = {"model.embed_tokens.weight": torch.zeros(32, 40), "lm_head.weight": torch.zeros(32, 40)}
    case.rewrite("finetuned", lambda tensors: tensors | wide)
    refused(
        case.argv("safemerge-full"), "2 problems", "model.embed_tokens.weight", "lm_head.weight", "[32, 24]",
        "[32, 40]", "one architecture",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "tuned"),
    [("I64", "F32"), ("F32", "I64"), ("F8_E4M3", "F32"), ("F32", "F8_E4M3"), ("U8", "F32"), ("BF16", "BOOL")],
)
def test_a_tensor_whose_dtype_cannot_hold_what_was_trained(world: Any, theirs: str, tuned: str) -> None:
    """Beside the linears: it would be cut to whole numbers, or could not be read."""
    tensors, name = world.llama(1), "model.layers.0.extra"
    dtypes = {
        "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
        "F32": torch.float32, "BF16": torch.bfloat16,
    }  # fmt: skip
    moved = {n: t * 2 for n, t in tensors.items()}
    aligned = world.checkpoint("aligned", tensors | {name: torch.ones(5).to(dtypes[theirs])})
    finetuned = world.checkpoint("finetuned", moved | {name: torch.ones(5).to(dtypes[tuned])})
    with pytest.raises(RequestError) as refused:
        scale(aligned=aligned, finetuned=finetuned, output=world.root / "out", factor=0.5)
    [offence] = refused.value.offences
    assert (offence.what, offence.got) == (name, tuned)
    assert offence.expected.startswith(f"{theirs}, as in")


def test_a_float_that_scale_does_not_treat_is_noted(world: Any, load_tensors: Any) -> None:
    tensors, name = world.llama(1), "model.layers.0.extra"
    aligned = world.checkpoint("aligned", tensors | {name: torch.ones(5).double()})
    moved = {n: t * 2 for n, t in tensors.items()} | {name: torch.full((5,), 3.0).double()}
    finetuned = world.checkpoint("finetuned", moved)
    result = scale(aligned=aligned, finetuned=finetuned, output=world.root / "out", factor=0.5, quiet=True)
    assert result.manifest is not None
    assert [(f.subject, f.done, f.why) for f in result.manifest.fallbacks] == [
        (name, "carried over", "its dtype is F64")
    ]
    assert torch.equal(load_tensors(world.root / "out")[name], moved[name])


def test_an_adapter_of_another_model(case: Case, refused: Any) -> None:
    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace("mlp.", "feed_forward."): t for n, t in tensors.items()}

    case.rewrite("adapter", renamed)
    message = refused(case.argv("scale"), WEIGHTS, "feed_forward.up_proj", str(case.paths["aligned"]), "base model")
    assert message.count("feed_forward") >= 6  # every module


def test_an_adapter_of_a_wider_model(case: Case, refused: Any) -> None:
    case.rewrite("adapter", lambda tensors: {n: t.repeat(1, 2) if "_A." in n else t for n, t in tensors.items()})
    message = refused(case.argv("safelora"), str(case.paths["aligned"]), "q_proj is 24 x 24", "24 x 48")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("combine", ["linear", "dare_linear"])
def test_ranks_that_differ(case: Case, refused: Any, combine: str) -> None:
    shutil.rmtree(case.paths["safe_adapter"])
    case.world.adapter("safe", case.world.llama(seed=1), rank=6)
    density = 0.5 if combine == "dare_linear" else None
    message = refused(
        case.argv("safemerge", combine=combine, density=density), "14 problems", UP, "ranks 4 and 6", "--combine exact"
    )
    assert str(case.paths["safe_adapter"]) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("lora_bias", True), ("alora_invocation_tokens", [1, 2]), ("bias", "all"),
        ("trainable_token_indices", [1]), ("target_parameters", ["mlp.experts.gate_up_proj"]), ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"), ("layer_replication", [[0, 1]]), ("kasa_config", {"beta": 1}),
        ("something_from_the_future", "x"),
    ],
)  # fmt: skip
def test_lora_variants(case: Case, refused: Any, key: str, value: object) -> None:
    case.edit_json("adapter", "adapter_config.json", lambda config: config | {key: value})
    refused(case.argv("safemerge"), "adapter_config.json", key)


def test_several_variants_at_once(case: Case, refused: Any) -> None:
    case.edit_json("adapter", "adapter_config.json", lambda config: config | {"use_dora": True, "lora_bias": True})
    case.edit_json("safe_adapter", "adapter_config.json", lambda config: config | {"peft_type": "LOHA"})
    refused(case.argv("safemerge"), "3 problems", "use_dora", "lora_bias", "LOHA")


def test_modules_to_save_in_both(case: Case, refused: Any) -> None:
    for role in ("adapter", "safe_adapter"):
        case.rewrite(role, replaced("base_model.model.lm_head.weight", torch.zeros(32, 24)))
        case.edit_json(role, "adapter_config.json", lambda config: config | {"modules_to_save": ["lm_head"]})
    refused(case.argv("safemerge"), str(case.paths["safe_adapter"]), "lm_head", "modules_to_save")


def spoil_truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-100])
    return "truncated"


def spoil_empty(file: Path) -> str:
    file.write_bytes(b"")
    return "0 bytes"


def spoil_header(file: Path) -> str:
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"x" + data[9:])
    return "JSON"


def spoil_html(file: Path) -> str:
    file.write_text("<!DOCTYPE html><title>404</title>" * 9)
    return "a web page"


@pytest.mark.parametrize("spoil", [spoil_truncate, spoil_empty, spoil_header, spoil_html])
@pytest.mark.parametrize("role", ["aligned", "unaligned", "adapter", "safe_adapter"])
def test_damaged_files(case: Case, refused: Any, role: str, spoil: Callable[[Path], str]) -> None:
    file = sorted(case.paths[role].glob("*.safetensors"))[0]
    reason = spoil(file)
    refused(case.argv("safemerge"), file.name, reason)


def test_all_damaged_files_are_named(case: Case, refused: Any) -> None:
    files = [next(case.paths[role].glob("*.safetensors")) for role in ("unaligned", "adapter", "safe_adapter")]
    for file in files:
        spoil_truncate(file)
    refused(case.argv("safemerge"), "3 problems", *map(str, files))


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "gone.safetensors"])
def test_an_index_that_points_elsewhere(case: Case, refused: Any, target: str) -> None:
    (case.root / "secret.safetensors").write_bytes(b"")
    case.edit_json("unaligned", INDEX, lambda i: {"weight_map": i["weight_map"] | {f"{UP}.weight": target}})
    refused(case.argv("safemerge"), INDEX, target)


def test_a_link_out_of_the_folder(case: Case, refused: Any) -> None:
    file = sorted(case.paths["unaligned"].glob("*.safetensors"))[0]
    shutil.move(file, case.root / "elsewhere.safetensors")
    file.symlink_to(case.root / "elsewhere.safetensors")
    refused(case.argv("safemerge"), file.name, "inside the folder")


def test_a_tensor_that_its_shard_lacks(case: Case, refused: Any) -> None:
    file = case.rewrite("unaligned", without(f"{UP}.weight"))
    refused(case.argv("safemerge"), INDEX, f"{UP}.weight", Path(file).name)


@pytest.mark.parametrize("role", ["unaligned", "adapter"])
def test_pickles(case: Case, refused: Any, role: str) -> None:
    for file in case.paths[role].glob("*.safetensors*"):
        file.unlink()
    name = "pytorch_model.bin" if role == "unaligned" else "adapter_model.bin"
    (case.paths[role] / name).write_bytes(b"\x80\x04.")
    refused(case.argv("safemerge"), str(case.paths[role]), name, "pickle", "safetensors")


def test_a_folder_that_is_not_there(case: Case, refused: Any) -> None:
    for role in ("aligned", "unaligned", "adapter", "safe_adapter"):
        key = role.replace("_", "-")
        refused(case.argv("safemerge", **{key: case.root / "no" / "such" / "folder"}), "no/such/folder")


@pytest.mark.parametrize("role", ["finetuned", "unaligned"])
def test_equal_to_the_aligned_model(case: Case, refused: Any, role: str) -> None:
    """The same folder, or a copy of it in other shards."""
    tensors = {n: t for f in case.paths["aligned"].glob("*.safetensors") for n, t in load_file(f).items()}
    copy = case.world.checkpoint("copy", tensors)
    for place in (copy, case.paths["aligned"]):
        refused(case.argv("safemerge-full", **{role: place}), str(place), "--aligned", "same", f"--{role}")


@pytest.mark.parametrize("threshold", ["high", "nan", "inf", ""])
def test_a_threshold_that_is_no_number(case: Case, refused: Any, threshold: str) -> None:
    for command in ("safemerge", "safelora"):
        refused(case.argv(command, threshold=threshold), "threshold")


@pytest.mark.parametrize(
    ("command", "changes", "named"),
    [
        ("scale", {"factor": "nan"}, "factor"),
        ("scale", {"factor": None}, "factor"),
        ("scale", {"finetuned": "x"}, "--adapter or --finetuned"),
        ("scale", {"device": "tpu"}, "--device"),
        ("scale", {"device": "cuda:99"}, "--device"),
        ("scale", {"dtype": "int8"}, "dtype"),
        ("scale", {"memory": "much"}, "--memory"),
        ("scale", {"memory": "0"}, "--memory"),
        ("scale", {"memory": "1MiB"}, "--memory"),
        ("scale", {"colour": "red"}, "colour"),
        ("safelora", {"num_layers": 3}, "--threshold or --num-layers"),
        ("safelora", {"threshold": None}, "--threshold or --num-layers"),
        ("safelora", {"threshold": None, "num_layers": 0}, "num-layers"),
        ("safemerge", {"combine": "ties"}, "combine"),
        ("safemerge", {"combine": "dare_linear"}, "density"),
        ("safemerge", {"combine": "dare_linear", "density": 1.5}, "density"),
        ("safemerge", {"rank": 3}, "--combine svd"),
        ("safemerge", {"combine": "svd", "rank": 3}, "--rank"),
        ("safemerge", {"safe-adapter": None}, "--safe-adapter"),
        ("score", {"output": "table.txt"}, ".csv or .json"),
    ],
)
def test_options(case: Case, refused: Any, command: str, changes: dict[str, Any], named: str) -> None:
    refused(case.argv(command, **changes), named)


def test_a_sharded_adapter(case: Case, refused: Any) -> None:
    """Which transformers can save and PEFT does not read."""
    folder = case.paths["adapter"]
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00001.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text("{}")
    refused(case.argv("safemerge"), str(folder), "a sharded adapter", "in one file")


def test_an_output_that_exists(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    out = case.root / "out"
    for make in (out.mkdir, lambda: out.write_text("mine"), lambda: out.symlink_to(case.paths["adapter"])):
        make()
        for extra in ([], ["--overwrite"] if not out.is_dir() or out.is_symlink() else []):
            with pytest.raises(SystemExit) as stop:
                main([*case.argv("scale"), *extra])
            assert stop.value.code == 2
            assert "out" in capsys.readouterr().err
        assert not list(case.root.glob("*.partial"))
        _ = out.rmdir() if out.is_dir() and not out.is_symlink() else out.unlink()


def test_an_output_under_a_file(case: Case, refused: Any) -> None:
    (case.root / "file").write_text("")
    refused(case.argv("scale", output=case.root / "file" / "out"), "--output", "is a file")


def test_quantised_and_fused_weights(case: Case, refused: Any) -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    for role in ("aligned", "unaligned", "finetuned", "safe-full"):
        tensors = {n: t for f in case.paths[role].glob("*.safetensors") for n, t in load_file(f).items()}
        shutil.rmtree(case.paths[role])
        case.world.checkpoint(case.paths[role].name, tensors | {experts: torch.randn(2, 24, 48).bfloat16()})
    refused(case.argv("safemerge-full"), experts, "[2, 24, 48]", "families.py")
    scaled = {f"{UP}.weight": torch.ones(40, 24, dtype=torch.int8), f"{UP}.SCB": torch.ones(40)}
    case.rewrite("aligned", lambda tensors: tensors | scaled)
    for command in ("safemerge", "safemerge-full"):
        refused(case.argv(command), str(case.paths["aligned"]), f"{UP}.SCB", "bitsandbytes")


@pytest.mark.parametrize("says_tied", [False, True])
def test_a_trained_head_that_the_layout_has_no_place_for(case: Case, refused: Any, says_tied: bool) -> None:
    """The aligned model ties its head; the fine-tuned one has one of its own, which would be lost.

    A merged adapter's config.json goes on to say that it is tied; transformers 5 loads what is stored.
    """
    for role in ("aligned", "unaligned", "finetuned", "safe-full"):
        tensors = {n: t for f in case.paths[role].glob("*.safetensors") for n, t in load_file(f).items()}
        shutil.rmtree(case.paths[role])
        tied = role != "finetuned"
        kept = {n: t for n, t in tensors.items() if not tied or n != "lm_head.weight"}
        case.world.checkpoint(case.paths[role].name, kept, tie_word_embeddings=tied or says_tied)
    refused(case.argv("safemerge-full"), str(case.paths["finetuned"]), "lm_head.weight", "extra", "untie the aligned")


BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
PLACES = [
    ("safemerge", "aligned", f"{UP}.weight"), ("safemerge", "unaligned", f"{UP}.weight"),
    ("safemerge", "adapter", f"{LORA}A.weight"), ("safemerge", "adapter", f"{LORA}B.weight"),
    ("safemerge", "safe_adapter", f"{LORA}B.weight"), ("safemerge-full", "finetuned", f"{UP}.weight"),
    ("safemerge-full", "safe-full", f"{UP}.weight"), ("safelora", "adapter", f"{LORA}A.weight"),
    ("safelora", "unaligned", f"{UP}.weight"), ("scale", "adapter", f"{LORA}A.weight"),
    ("scale", "adapter", f"{LORA}B.weight"), ("score", "aligned", f"{UP}.weight"),
]  # fmt: skip


@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize(("command", "role", "name"), PLACES)
def test_not_finite_underway(case: Case, refused: Any, command: str, role: str, name: str, bad: str) -> None:
    def spoiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[7] = BAD[bad]
        return tensors

    file = case.rewrite(role, spoiled)
    threshold = {"threshold": 1.01} if command.startswith("safemerge") else {}
    refused(case.argv(command, **threshold), file, name, "NaN or infinity", status=1)


def test_a_value_that_the_output_dtype_cannot_hold(case: Case, refused: Any) -> None:
    case.rewrite("adapter", replaced(f"{LORA}B.weight", torch.full((40, 4), 1e6)))
    refused(case.argv("scale", dtype="float16"), f"{LORA}B.weight", "does not fit F16", "--dtype", status=1)


def test_a_number_of_offences_is_cut(case: Case, refused: Any) -> None:
    for role in ("adapter", "safe_adapter"):
        case.rewrite(role, lambda tensors: {n.replace("_proj.", "_project."): t for n, t in tensors.items()})
    message = refused(case.argv("safemerge"), "28 problems of 2 kinds")
    assert len(message.splitlines()) == 3


def test_hostile_names_are_escaped(case: Case, refused: Any) -> None:
    case.rewrite("adapter", lambda tensors: {n.replace("up_", "up\x1b[31m\u202e"): t for n, t in tensors.items()})
    message = refused(case.argv("scale"), "\\x1b[31m\\u202e")
    assert "\x1b" not in message
