"""A word-level tokenizer with a chat template, in the layout of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from safeshard.bench.toy.language import Example, vocabulary
from safeshard.streamer.extras import require

PAD, END, USER, ASSISTANT = SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<assistant> {{ message['content'] }} <eos>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` that pads on the left, as generation in batches needs it."""
    tokenizers, transformers = require("tokenizers", "bench"), require("transformers", "bench")
    words = {word: index for index, word in enumerate([*SPECIAL, *vocabulary()])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=PAD))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT],
        padding_side="left", chat_template=CHAT_TEMPLATE, model_max_length=64,
    )  # fmt: skip


def messages(example: Example) -> list[dict[str, str]]:
    """An example as a conversation."""
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]


def prompts(tokenizer: Any, examples: Iterable[Example]) -> list[str]:
    """What the model sees of each example before it answers."""
    turns = [messages(example)[:1] for example in examples]
    texts: list[str] = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return texts


def token_ids(tokenizer: Any, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and of answer, `<eos>` included, for each example."""
    conversations = [messages(example) for example in examples]
    whole = tokenizer(tokenizer.apply_chat_template(conversations, tokenize=False), add_special_tokens=False).input_ids
    asked = tokenizer(prompts(tokenizer, examples), add_special_tokens=False).input_ids
    return [(ids[: len(start)], ids[len(start) :]) for ids, start in zip(whole, asked, strict=True)]
