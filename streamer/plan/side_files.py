"""The small files beside the weights that an output takes over."""

from __future__ import annotations

from safeshard.streamer.sources import Source

# What else a folder of weights needs to be loaded and prompted; never code.
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja",
    "chat_template.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip


MAX_SIDE_BYTES = 256 << 20  # the largest in use are tokenizers of some 30 MB


def side_files(source: Source) -> dict[str, bytes]:
    sizes = source.sizes()
    return {name: source.read(name, 0, sizes[name]) for name in SIDE_FILES if name in sizes}
