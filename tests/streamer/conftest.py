"""Tiny models on disk for Safe Delta, and the plain computation that its results are compared with."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeshard.streamer import safedelta
from safeshard.streamer.run.result import Result

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LENGTHS = [5, 11, 1, 7, 7, 12, 3, 9, 20, 16, 13, 20]
BLOCK, SUB_BLOCK = 20, 4  # widths of 32 and 48: a ragged last block
PERCDAMP = 0.1  # tiny models have ill-conditioned Grams, where the fp32 of the forward pass would show
Tensors = dict[str, Tensor]


class Case:
    """A tiny model on disk, fp32: aligned, a fine-tuned checkpoint, an adapter on all its linears, calibration data."""

    block = BLOCK
    lengths = LENGTHS

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        common = {"vocab_size": 97} if kind == "gpt2" else COMMON
        config = transformers.AutoConfig.for_model(kind, **common | MODELS[kind])
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in self.model.parameters():  # norms and biases too
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        self.model.save_pretrained(root / "aligned")
        self.config = (root / "aligned/config.json").read_text()
        self.aligned = load_file(root / "aligned/model.safetensors")
        self.finetuned = {name: t + 0.01 * torch.randn_like(t) for name, t in self.aligned.items()}
        self.write("finetuned", self.finetuned)
        self.adapter = self.make_adapter("adapter")
        generator = torch.Generator().manual_seed(1)
        self.tokens = [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps({"input_ids": tokens}) + "\n" for tokens in self.tokens))
        self.grams = self._grams()

    def write(self, name: str, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
        """A checkpoint folder with the aligned model's config."""
        folder = self.root / name
        folder.mkdir()
        (folder / "config.json").write_text(self.config)
        files = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(sorted(tensors))}
        if shards == 1:
            files = dict.fromkeys(tensors, "model.safetensors")
        else:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            save_file({n: t.contiguous() for n, t in tensors.items() if files[n] == file}, folder / file)
        return folder

    def make_adapter(self, name: str, seed: int = 2, rank: int = 3, **config: Any) -> Path:
        """An adapter that PEFT saved: on every decoder linear, A and B random."""
        torch.manual_seed(seed)
        targets = {n.rpartition(".")[2] for n, m in self.model.named_modules() if _is_linear(m)} - {"lm_head"}
        settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets)} | config
        settings["fan_in_fan_out"] = self.kind == "gpt2"
        model = transformers.AutoModelForCausalLM.from_pretrained(self.root / "aligned", dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
            elif "modules_to_save" in key:
                parameter.data.add_(1.0)
        wrapped.save_pretrained(self.root / name, save_embedding_layers=False)
        return self.root / name

    def run(self, out: str, **options: Any) -> tuple[Result, Tensors]:
        """Safe Delta on the adapter, or on what `options` name; its result and its tensors."""
        result = safedelta(**self.options(out, **options))
        return result, self.tensors(out)

    def options(self, out: str, **options: Any) -> dict[str, Any]:
        defaults = {
            "aligned": self.root / "aligned", "output": self.root / out, "block_size": BLOCK, "sub_block": SUB_BLOCK,
            "dtype": "float32", "quiet": True,
        }  # fmt: skip
        if "factors" not in options:
            defaults |= {"calibration": self.data, "samples": len(LENGTHS), "percdamp": PERCDAMP}
        if "finetuned" not in options:
            defaults |= {"adapter": self.adapter}
        return defaults | options

    def loaded(self, adapter: Path) -> Tensors:
        """Decoder weights (O x I) once PEFT has merged an adapter; all of its tensors must be used."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.root / "aligned", dtype=torch.float32)
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        stored = load_file(adapter / "adapter_model.safetensors")
        assert {key.replace(".default", "") for key in wrapped.state_dict() if "lora_" in key} == {
            key for key in stored if "lora_" in key
        }
        merged = wrapped.merge_and_unload()
        return {name: _weight(module) for name, module in merged.named_modules() if name in self.grams}

    def deltas(self, adapter: Path, tensors: Tensors) -> Tensors:
        """Scaling * B A (fp64) of an adapter's tensors by module, for a config with one scaling."""
        config = json.loads((adapter / "adapter_config.json").read_text())
        found = {}
        for key, a in tensors.items():
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                scaling = config["lora_alpha"] / config["r"]
                found[module] = scaling * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
        return found

    def weight(self, tensors: Mapping[str, Tensor], module: str) -> Tensor:
        """A module's weight as O x I."""
        names = [
            name for name in tensors if (name == f"{module}.weight" or f"transformer.{name}" == f"{module}.weight")
        ]
        return tensors[names[0]].T if self.kind == "gpt2" else tensors[names[0]]

    def _grams(self) -> Tensors:
        """(2 / N) X^T X of every decoder linear's input, one unpadded sample at a time through the whole model."""
        grams: dict[str, Any] = defaultdict(float)

        def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0][0].double()
                grams[name] = grams[name] + x.T @ x * 2 / len(LENGTHS)

            return hook

        linears = {name: m for name, m in self.model.named_modules() if _is_linear(m) and name != "lm_head"}
        handles = [module.register_forward_pre_hook(add(name)) for name, module in linears.items()]
        with torch.no_grad():
            for sample in self.tokens:
                self.model(input_ids=torch.tensor([sample]))
        for handle in handles:
            handle.remove()
        return dict(grams)

    def tensors(self, out: str) -> Tensors:
        """All tensors of an output."""
        return {
            name: t for file in sorted((self.root / out).glob("*.safetensors")) for name, t in load_file(file).items()
        }

    def weights(self, out: str) -> dict[str, bytes]:
        """The bytes of an output's safetensors files."""
        files = {path.name: path.read_bytes() for path in sorted((self.root / out).glob("*.safetensors"))}
        assert files
        return files

    def command(self, out: str, **options: Any) -> list[object]:
        """`options` as the command line takes them."""
        words: list[object] = ["safedelta"]
        for name, value in self.options(out, **options).items():
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        return words

    @staticmethod
    def published(delta: Tensor, gram: Tensor, strength: float, rows_alone: bool = False) -> tuple[Tensor, Tensor]:
        """The delta written and the entries kept, in fp64: sort all entries of a block, then the loop over sub-blocks.

        `rows_alone` gives each row the block's budget over the rows, and never takes the 15 % costliest columns.
        """
        rows, columns = delta.shape
        diagonal = gram.diagonal()
        damped = gram + torch.diag(torch.where(diagonal == 0, 1.0, 0.0))
        damped += PERCDAMP * damped.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        delta, new = delta.double(), torch.zeros_like(delta, dtype=torch.float64)
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            price = 1 / u.diagonal()[start:stop] ** 2
            budget = price.mean() * strength / 2 * rows / 4096
            loss = (delta - new)[:, start:stop] ** 2 * price
            if rows_alone:
                order = torch.argsort(price, stable=True)[: stop - start - int(0.15 * (stop - start))]
                for row in range(rows if strength else 0):
                    taken = order[torch.cumsum(loss[row, order], 0) <= budget / rows]
                    mask[row, start + taken] = True
            else:
                entries = torch.argsort(price.repeat_interleave(rows), stable=True)  # column by column
                entries = entries[: len(entries) - int(0.15 * len(entries))]
                taken = entries[torch.cumsum(loss.T.flatten()[entries], 0) <= budget]
                mask[taken % rows, start + taken // rows] = bool(strength)
            for i in range(start, stop, SUB_BLOCK):
                j = min(i + SUB_BLOCK, stop)
                errors = torch.where(mask[:, i:j], new[:, i:j] - delta[:, i:j], 0.0) / u.diagonal()[i:j]
                new[:, i:j] = torch.where(mask[:, i:j], delta[:, i:j], new[:, i:j])
                new[:, j:] -= errors @ u[i:j, j:]
        return new, mask


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach().T if isinstance(module, transformers.pytorch_utils.Conv1D) else module.weight.detach()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Kind -> its case, each built once."""
    built: dict[str, Case] = {}

    def get(kind: str) -> Case:
        if kind not in built:
            built[kind] = Case(tmp_path_factory.mktemp(kind), kind)
        return built[kind]

    return get


@pytest.fixture
def llama(case: Any, tmp_path: Path) -> Case:
    """The Llama case, writing to a folder of its own."""
    shared: Case = case("llama")
    own = object.__new__(Case)
    own.__dict__ |= shared.__dict__
    own.root = tmp_path
    (tmp_path / "aligned").symlink_to(shared.root / "aligned")
    (tmp_path / "finetuned").symlink_to(shared.root / "finetuned")
    return own
