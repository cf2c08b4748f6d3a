"""`make demo`: the main job on small checkpoints that it makes itself with transformers and PEFT, in seconds."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from safeshard import streamer
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.cli import main
from safeshard.streamer.extras import require
from safeshard.streamer.messages import summary

MARKER = ".safeshard-demo"  # in a folder that the demo made, and may hence remove
app = typer.Typer(invoke_without_command=True, help="Run the methods on small models made on the spot.")


@app.callback()
def demo(
    folder: Annotated[Path, typer.Option(help="where models and outputs go; replaced if it is a demo's")] = Path(
        "demo"
    ),
) -> None:
    """Make models and adapters, score them, defend them in one batch, verify the outputs, and load one with PEFT."""
    _renew(folder)
    models, out = folder / "models", folder / "outputs"
    print(f"Making a 4-layer Llama, an aligned version of it and two LoRA adapters in {models}\n")
    make_models(models)
    common: dict[str, Any] = {"aligned": models / "aligned", "unaligned": models / "unaligned"}
    adapter = str(models / "fine-tuned")

    print("1. How far does the adapter keep to the alignment subspace?  safeshard score\n")
    [scored] = streamer.score(**common, adapter=adapter, quiet=True)
    known = sorted(c for c in scored.cosines.values() if c is not None)
    median = known[len(known) // 2]
    print(f"   {len(known)} modules, cosines from {known[0]:.3f} to {known[-1]:.3f}, median {median:.3f}\n")

    print("2. SafeMERGE, SafeLoRA and the scaled baseline in one pass.  safeshard batch jobs.yaml\n")
    jobs = folder / "jobs.yaml"
    jobs.write_text(JOBS.format(models=models, out=out, threshold=round(median, 3)))
    print("   " + jobs.read_text().replace("\n", "\n   "))
    results = streamer.batch(jobs)
    print(summary(results))

    print(f"\n3. What was decided?  safeshard inspect {out}/safemerge\n")
    print(streamer.inspect(out / "safemerge", width=100))

    print(f"4. Is every byte as written?  safeshard verify {out}/safemerge\n")
    print(f"   differences: {len(streamer.verify(out / 'safemerge'))}\n")

    print("5. It loads in PEFT as it is:\n")
    print(
        f"   largest change of a logit against the fine-tuned adapter: {logit_change(models, out / 'safemerge'):.4f}\n"
    )
    print("Next, on your own models:\n")
    print("   safeshard score --aligned org/model-chat --unaligned org/model --adapter path/to/adapter")
    print("   safeshard safemerge --aligned org/model-chat --unaligned org/model --adapter path/to/adapter \\")
    print("       --safe-adapter path/to/safe-adapter --output defended")


def _renew(folder: Path) -> None:
    """Make `folder` anew, empty but for the marker.

    Raises:
        RequestError: it holds something, and no demo made it.
    """
    if (folder / MARKER).is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        got = "something that the demo did not make"
        raise RequestError(Offence("--folder", str(folder), "a new folder, or a demo's", got, "choose another"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


JOBS = """\
defaults:
  aligned: {models}/aligned
  unaligned: {models}/unaligned
  adapter: {models}/fine-tuned
jobs:
  - method: safemerge
    safe_adapter: {models}/safe
    threshold: {threshold}
    output: {out}/safemerge
  - method: safelora
    num_layers: 7
    output: {out}/safelora
  - method: scale
    factor: 0.5
    output: {out}/scale
"""


def make_models(folder: Path) -> None:
    """A random Llama, a perturbed copy of it as the aligned version, and two random LoRA adapters."""
    transformers, peft = require("transformers", "bench"), require("peft", "bench")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=512, torch_dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "unaligned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim == 2 else 0
    model.save_pretrained(folder / "aligned")
    for seed, name in enumerate(("fine-tuned", "safe"), 1):
        torch.manual_seed(seed)
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "aligned")
        lora = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        peft.get_peft_model(base, lora).save_pretrained(folder / name)


def logit_change(models: Path, defended: Path) -> float:
    """Load the fine-tuned and the defended adapter with PEFT and compare their outputs on a few tokens."""
    transformers, peft = require("transformers", "bench"), require("peft", "bench")
    tokens = torch.arange(16)[None]
    logits: list[Any] = []
    for adapter in (models / "fine-tuned", defended):
        base = transformers.LlamaForCausalLM.from_pretrained(models / "aligned")
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(base, adapter)(tokens).logits.float())
    return float((logits[0] - logits[1]).abs().max())


if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
