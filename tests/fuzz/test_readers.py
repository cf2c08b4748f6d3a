"""Every reader of files from elsewhere, given valid documents that were tampered with, and all cases found so far.

A reader takes the file or refuses it with RequestError, RunError or HeaderError: nothing else comes out of it, in
bounded time and memory. `corpus/READER/` holds cases; those whose name begins with `ok-` are taken, `any-` may be
either, all others are refused. SAFESHARD_SOAK multiplies the number of examples, and makes each run draw new ones.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safeshard.manifests import Manifest, RequestError
from safeshard.manifests.card import card
from safeshard.manifests.errors import RunError
from safeshard.manifests.render import render
from safeshard.manifests.report import page
from safeshard.manifests.safetensors_header import HeaderError, layout, read_header
from safeshard.streamer.calibration.data.prompts import load_prompts
from safeshard.streamer.calibration.factor_files import SavedFactors, sample_weights
from safeshard.streamer.inputs.adapter import open_adapter
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.plan.request.jobs_file import read_jobs
from safeshard.streamer.write.writer import Writer

SOAK = int(os.environ.get("SAFESHARD_SOAK", "1"))
HERE = Path(__file__).parent
GOLDEN = HERE.parent / "goldens/llama/aligned/config.json"
REFUSALS = (RequestError, RunError, HeaderError)
READERS = (
    "header", "index", "config", "adapter_config", "adapter_header", "jobs", "manifest", "journal", "calibration",
    "factors",
)  # fmt: skip
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SHARDS = {
    "model-1.safetensors": [("model.embed_tokens.weight", "BF16", (8, 4)), (f"{Q}.weight", "BF16", (4, 4))],
    "model-2.safetensors": [(f"{K}.weight", "BF16", (4, 4)), ("model.norm.weight", "F32", (4,))],
}
PAIRS = [
    (f"base_model.model.{name}.lora_{side}.weight", "F32", (2, 4) if side == "A" else (4, 2))
    for name in (Q, K)
    for side in "AB"
]


def safetensors(tensors: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    header, refs = layout("x", tensors, {"format": "pt"})
    return header + bytes(sum(ref.nbytes for ref in refs.values()))


CHECKPOINT = {name: safetensors(tensors) for name, tensors in SHARDS.items()} | {
    INDEX: json.dumps({"weight_map": {n: f for f, ts in SHARDS.items() for n, _, _ in ts}}).encode(),
    "config.json": b'{"model_type": "llama", "tie_word_embeddings": true, "num_hidden_layers": 1, "text_config": {}}',
}
ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"], "bias": "none",
    "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 1.5}, "exclude_modules": None, "use_rslora": False,
    "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None, "init_lora_weights": True,
}  # fmt: skip
ADAPTER = {"adapter_config.json": json.dumps(ADAPTER_CONFIG).encode(), "adapter_model.safetensors": safetensors(PAIRS)}


class Readers:
    """The readers by name: each takes the bytes of one file, the others of its folder being sound."""

    def __init__(self, folder: Any, root: Path) -> None:
        self.folder, self.root = folder, root
        self.base = open_checkpoint(folder(CHECKPOINT))
        (root / "model").mkdir()
        (root / "model/config.json").write_bytes(GOLDEN.read_bytes())
        words = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(root / "model")
        (root / "factors").mkdir()
        (root / "factors/factors-00000.safetensors").write_bytes(safetensors([("u", "F32", (4, 4))]))
        (root / "out.partial").mkdir()

    def header(self, data: bytes) -> None:
        read_header("x", len(data), lambda start, stop: data[start:stop])

    def index(self, data: bytes) -> None:
        self._checkpoint({INDEX: data})

    def config(self, data: bytes) -> None:
        self._checkpoint({"config.json": data})

    def _checkpoint(self, files: dict[str, bytes]) -> None:
        checkpoint = open_checkpoint(self.folder(CHECKPOINT | files))
        _ = checkpoint.stores_transposed, checkpoint.weight("lm_head")
        list(checkpoint.untreatable_tensors())
        list(checkpoint.treatable(checkpoint.linears))

    def adapter_config(self, data: bytes) -> None:
        self._adapter({"adapter_config.json": data})

    def adapter_header(self, data: bytes) -> None:
        self._adapter({"adapter_model.safetensors": data})

    def _adapter(self, files: dict[str, bytes]) -> None:
        adapter = open_adapter(self.folder(ADAPTER | files, "adapter"), self.base)
        assert {adapter.own_name(name) for name in adapter.modules} == {Q, K}

    def jobs(self, data: bytes) -> None:
        for job in read_jobs(self._file("jobs.yaml", data)):
            job.settings()

    def manifest(self, data: bytes) -> None:
        manifest = Manifest.from_json(data)
        manifest.content_hash()
        render(manifest, width=100)
        card(manifest, None, "adapter")
        page([("out", manifest)])
        assert Manifest.from_json(manifest.to_json()) == manifest.sealed()

    def journal(self, data: bytes) -> None:
        self._file("out.partial/journal.jsonl", data)
        writer = Writer(self.root / "out", [], {"a": [1]}, overwrite=False)
        writer._parts.close()  # the journal stays, for the next case
        writer.journal.close()

    def calibration(self, data: bytes) -> None:
        load_prompts(self._file("data.jsonl", data), self.root / "model", samples=1)

    def factors(self, data: bytes) -> None:
        self._file("factors/factors.json", data)
        SavedFactors(str(self.root / "factors"), self.base)

    def _file(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    def document(self, reader: str) -> Any:
        """A valid document, as JSON values."""
        if reader in ("header", "adapter_header"):
            data = CHECKPOINT["model-1.safetensors"] if reader == "header" else ADAPTER["adapter_model.safetensors"]
            return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if reader == "jobs":
            job = {"method": "safemerge", "adapter": "b", "weights": [0.5, 0.5], "matrix": {"threshold": [0.1, 0.2]}}
            defaults = {"aligned": "a", "unaligned": "u", "safe_adapter": "s"}
            return {"defaults": defaults, "jobs": [job | {"output": "out/{adapter}-{threshold}"}]}
        if reader == "journal":
            records = [{"kind": "tensor", "name": "a", "blake3": "00"}, {"kind": "module", "entry": {"name": "a"}}]
            return [{"journal": "safeshard.journal/1", "fingerprint": {"a": [1]}}, *records]
        if reader == "calibration":
            chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
            return [{"input_ids": [1, 2]}, {"messages": chat}, {"instruction": "hi", "output": "hi"}]
        if reader == "factors":
            files = [{"name": f.name, "size": f.size, "header_sha256": f.sha256} for f in self.base.files]
            group = {"modules": [Q, K], "file": "factors-00000.safetensors", "tensor": "u", "damping": 0.1}
            data_file = {"name": "d", "size": 1, "blake3": "0" * 64}
            return {
                "schema": "safeshard.factors/1", "safeshard": "0", "torch": "2", "sample": sample_weights(self.base),
                "aligned": {"source": "a", "files": files}, "calibration": {"source": "d", "files": [data_file]},
                "options": {"samples": 1}, "layers": [[group | {"blake3": "0" * 64}]],
            }  # fmt: skip
        files = {"index": CHECKPOINT[INDEX], "config": CHECKPOINT["config.json"]}
        files |= {"adapter_config": ADAPTER["adapter_config.json"]}
        files |= {"manifest": (HERE.parent / "manifests/data/manifest.json").read_bytes()}
        return json.loads(files[reader])


@pytest.fixture(scope="module")
def readers(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return Readers(folder, tmp_path_factory.mktemp("readers"))


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list[list[Any]]):
    """A JSON object as its [key, value] pairs: keys may repeat."""


def tree(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs([key, tree(item)] for key, item in value.items())
    return [tree(item) for item in value] if isinstance(value, list) else value


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(item)}" for key, item in value) + "}"
    return "[" + ",".join(map(dump, value)) + "]" if isinstance(value, list) else json.dumps(value)


def encode(reader: str, value: Any) -> bytes:
    """A document as the bytes of its file."""
    if reader in ("header", "adapter_header"):
        text = dump(value).encode()
        return struct.pack("<Q", len(text)) + text + bytes(96 if reader == "header" else 4 * 4 * 8)
    if reader == "journal" and isinstance(value, list):
        bodies = [dump(record)[:-1].encode() for record in value]
        return b"".join(body + b',"crc":"%08x"}\n' % zlib.crc32(body) for body in bodies)
    if reader == "calibration" and isinstance(value, list):
        return "\n".join(map(dump, value)).encode()
    return dump(value).encode()


TEXTS = [
    "", "..", "../x", "/etc/passwd", "a\0b", "\u202e", "\x1b[2J", "a." * 5000, "9" * 400, "1.2.3", "(a+)+$", "(",
    "[[:a:]]", "(.*a){20}", "(a|a)*b", "(?i)x", "q{e<9}", "{output}", "all-linear", "<script>", "=1+1", "NaN",
    "__metadata__",
]  # fmt: skip
HOSTILE: list[Any] = [
    *TEXTS, *map(Raw, ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 200 + "]" * 200, "[" * 9000, '"\\ud800"', ""]),
    *map(Raw, ['{"a":1,"a":2}', "-0.0", "1e308", "[" + "0," * 30000 + "0]", '{"a":' * 500 + "1" + "}" * 500, "x"]),
    None, True, 0, -1, 1.5, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, [], {}, [None], [[]], [2**62, 0, 2**62],
    [2**62] * 70,
]  # fmt: skip


def slots(value: Any) -> Iterator[tuple[list[Any], int]]:
    """Every place of a tree that a value can be put into: its list and index."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            place = (item, 1) if isinstance(value, Pairs) else (value, number)
            yield place
            yield from slots(place[0][place[1]])


@st.composite
def tampered(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three places replaced, renamed, repeated, dropped, or taken from elsewhere in it."""
    root = [tree(document)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(slots(root))
        holder, at = places[draw(st.integers(0, len(places) - 1))]
        what = draw(st.sampled_from(["value", "value", "key", "more", "fewer", "other"]))
        item = holder[at]
        if what == "value":
            holder[at] = tree(draw(st.sampled_from(HOSTILE)))
        elif what == "other":
            other, index = places[draw(st.integers(0, len(places) - 1))]
            holder[at] = copy.deepcopy(other[index])
        elif isinstance(item, list) and item and what != "key":
            item.append(copy.deepcopy(item[0])) if what == "more" else item.pop()
        elif isinstance(item, Pairs) and item:
            item[draw(st.integers(0, len(item) - 1))][0] = draw(st.sampled_from(TEXTS))
    return root[0]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes whole (mostly), cut off, or with flipped bits."""
    what = draw(st.sampled_from(["whole", "whole", "whole", "cut", "flip"]))
    if what == "cut":
        return data[: draw(st.integers(0, len(data)))]
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4)) if what == "flip" and data else 0):
        changed[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@pytest.mark.parametrize("reader", READERS)
def test_the_documents_are_valid(readers: Readers, reader: str) -> None:
    getattr(readers, reader)(encode(reader, tree(readers.document(reader))))


@pytest.mark.parametrize("reader", READERS)
def test_tampered_files_are_taken_or_refused(readers: Readers, reader: str, bounded: Callable[[], Any]) -> None:
    document = readers.document(reader)

    @settings(
        max_examples=100 * SOAK, deadline=None, derandomize=SOAK == 1, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        content = data.draw(damaged(encode(reader, data.draw(tampered(document)))))
        note(f"a file for corpus/{reader}: {content!r}")
        refusal_of(readers, reader, content, bounded)

    check()


def refusal_of(readers: Readers, reader: str, content: bytes, bounded: Callable[[], Any]) -> str:
    """The message of the refusal, fit for a terminal; "" where the file is taken."""
    try:
        with bounded():
            getattr(readers, reader)(content)
    except REFUSALS as error:
        message = str(error)
    else:
        return ""
    assert message.replace("\n", "").isprintable()  # a line each problem
    return message


CASES = [path for reader in READERS for path in sorted((HERE / "corpus" / reader).iterdir())]


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_cases_found_so_far(readers: Readers, case: Path, bounded: Callable[[], Any]) -> None:
    message = refusal_of(readers, case.parent.name, case.read_bytes(), bounded)
    if not case.name.startswith("any-"):
        assert bool(message) != case.name.startswith("ok-"), message
