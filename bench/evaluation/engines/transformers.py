"""Checkpoints and adapters in this process, with transformers and PEFT.

A base is loaded once, however many adapters on it follow each other. Batches are the same whatever was answered before
and each has a seed of its own, so an evaluation that was interrupted ends with the answers of an undisturbed one. The
model's own generation settings are put aside: what is not in the suite's sampling is off.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeshard.bench.evaluation.engines.base import Answer
from safeshard.bench.evaluation.prompts import Message
from safeshard.bench.evaluation.suite import Sampling
from safeshard.manifests.errors import RunError, printable
from safeshard.streamer.extras import require, require_transformers

ADAPTER = "adapter_config.json"


class Loader:
    """Loads models; keeps the last base, for the next adapter may stand on it."""

    def __init__(self, device: str, batch: int) -> None:
        self.device, self.batch = device, batch
        self._place, self._base = "", None

    def open(self, model: str, aligned: str | None) -> Transformers:
        """Load a checkpoint, or an adapter on `aligned`.

        Raises:
            RunError: it does not load.
        """
        transformers = require_transformers("evaluate")
        transformers.utils.logging.disable_progress_bar()  # there is one bar, over answers
        transformers.utils.logging.set_verbosity_error()
        adapter = aligned if (Path(model) / ADAPTER).is_file() else None
        warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
        try:
            loaded = self._load(transformers, adapter or model)
            tokenizer = _tokenizer(transformers, model, adapter)
            if adapter is not None:
                loaded = require("peft", "evaluate").PeftModel.from_pretrained(loaded, model)
        except Exception as error:  # what transformers, PEFT and safetensors raise
            raise RunError(f"{model} does not load: {printable(error)}", "see that it is a whole checkpoint") from error
        return Transformers(loaded.eval(), tokenizer, self.batch)

    def _load(self, transformers: Any, place: str) -> Any:
        if place != self._place:
            self._base = None
            gc.collect()
            name, _, revision = place.removeprefix("hf://").partition("@")
            self._base = transformers.AutoModelForCausalLM.from_pretrained(
                name, revision=revision or None, dtype="auto", attn_implementation="sdpa", trust_remote_code=False,
                use_safetensors=True,
            ).to(self.device)  # fmt: skip
            self._place = place
        return self._base


class Transformers:
    """A loaded model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    def answers(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
        """Generate in one batch, padded on the left."""
        import torch

        texts = [rendered(self.tokenizer, turns) for turns in conversations]
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            ids = self.model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                generation_config=_settings(self.model.generation_config, self.tokenizer, sampling),
            )  # fmt: skip
        found = self.tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return [Answer(text.strip()) for text in found]

    def close(self) -> None:
        """Take an adapter off its base."""
        if hasattr(self.model, "peft_config"):
            self.model.unload()
        self.model = None


def rendered(tokenizer: Any, turns: Sequence[Message]) -> str:
    """The text of a conversation up to where the model goes on.

    A tokenizer without a chat template gets Llama 2's form, as calibration does.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    if tokenizer.chat_template is not None:
        goes_on = turns[-1][0] != "assistant"  # templates of guards open their own verdict after an assistant's answer
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=goes_on)
        return text
    system = next((f"<<SYS>>\n{content}\n<</SYS>>\n\n" for role, content in turns if role == "system"), "")
    parts, first = [tokenizer.bos_token or ""], True
    for role, content in turns:
        if role == "user":
            parts.append(f"[INST] {system if first else ''}{content} [/INST]")
            first = False
        elif role == "assistant":
            parts.append(f" {content} ")
    return "".join(parts)


def _tokenizer(transformers: Any, model: str, adapter_on: str | None) -> Any:
    own = adapter_on is None or (Path(model) / "tokenizer_config.json").is_file()
    name, _, revision = (model if own else str(adapter_on)).removeprefix("hf://").partition("@")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        name, revision=revision or None, padding_side="left", trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _settings(own: Any, tokenizer: Any, sampling: Sampling) -> Any:
    transformers = require_transformers("evaluate")
    drawn = {
        "do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p or 1.0,
    } if sampling.temperature else {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # fmt: skip
    return transformers.GenerationConfig(
        max_new_tokens=sampling.max_tokens, repetition_penalty=1.0, eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **drawn,
    )  # fmt: skip
