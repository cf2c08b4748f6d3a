"""A folder on a web server as a source. It has no listing: the files that a model or an adapter has are asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from urllib.parse import quote, urlsplit, urlunsplit

from safeshard.streamer.sources.base import MAX_JSON_BYTES, require
from safeshard.streamer.sources.http import Answer, Target, read_body, request, status_words
from safeshard.streamer.sources.remote import OPENING, Final, StatusError, retry_after
from safeshard.streamer.sources.url import Listed, RemoteFolder

INDEX = "model.safetensors.index.json"
KNOWN = (
    "config.json", INDEX, "model.safetensors", "adapter_config.json", "adapter_model.safetensors", "factors.json",
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "tekken.json", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md",
)  # fmt: skip
FILE = re.compile(r"[\w-][\w.-]*", re.ASCII)


class WebSource(RemoteFolder):
    """`https://host/folder`. Each file is pinned by its ETag; shards are those that the index names."""

    expected = "a folder on a web server that serves byte ranges"

    def _list(self) -> Mapping[str, Listed]:
        files = self._ask(KNOWN)
        if not files:
            problem = f"{self.spec}: none of config.json, adapter_config.json and so on is there"
            raise Final(problem, "name the folder that holds the model's files")
        if INDEX in files and files[INDEX].size <= MAX_JSON_BYTES:
            index = self._target(INDEX, files[INDEX]).whole(self._line, OPENING)
            files |= self._ask(sorted(_shards(index) - files.keys()))
        return files

    def _ask(self, names: Sequence[str]) -> dict[str, Listed]:
        asks = [partial(self._line.patiently, self.spec, partial(self._head, name), OPENING) for name in names]
        found = self._line.all(self.spec, asks)
        return {name: file for name, file in zip(names, found, strict=True) if file is not None}

    def _head(self, name: str) -> Listed | None:
        """Size and ETag of a file, by a request for its first byte; None where it is not there."""
        with request("GET", self._address(name), {"Range": "bytes=0-0"}) as answer:
            if answer.status in (404, 410):
                return None
            if answer.status == 416:  # it is empty
                return Listed(0)
            if answer.status >= 300:
                raise StatusError(answer.status, status_words(answer), retry_after(answer.headers))
            match = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status != 206 or match is None:
                raise Final(f"{self.spec}/{name}: the server ignores byte ranges", "use a server that serves them")
            read_body(answer)
            return Listed(int(match[1]), answer.headers.get("ETag") or answer.headers.get("Last-Modified"))

    def _fill(self, name: str, offset: int, view: memoryview, tries: int) -> None:
        require(self, name)
        if len(view):
            self._target(name, self._files[name]).fill(self._line, offset, view, tries)

    def _target(self, name: str, file: Listed) -> Target:
        where = f"{self.spec}/{name}"

        def check(answer: Answer) -> None:
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if mark != file.mark:
                raise Final(f"{where}: it changed while it was read", "run the same command again once it is at rest")

        strong = file.mark is not None and file.mark.startswith('"')
        return Target(where, self._address(name), file.size, {}, file.mark if strong else None, check)

    def _address(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def _shards(index: bytes) -> set[str]:
    """The files that an index names, as far as they lie in the same folder; whoever reads it checks it."""
    try:
        weight_map = json.loads(index)["weight_map"]
        return {name for name in weight_map.values() if isinstance(name, str) and FILE.fullmatch(name)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
