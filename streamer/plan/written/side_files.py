"""The small files beside the weights that an output takes over, and those that stay behind.

By rule, not by name: whatever is small and no weight goes along, from the fine-tuned folder first, then from the
aligned one. A licence always does; where the two differ, both. What never does is code, pickles (both run when they
are loaded), other weights, hidden files, and what a Trainer keeps to go on. All that stays behind is said.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME, Fallback
from safeshard.streamer.inputs import lora_config
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.plan.job_plan import JobPlan, SideFile
from safeshard.streamer.sources import LocalSource, Source

# What a folder of weights needs to be loaded and prompted: too large a one is refused, not left out.
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja",
    "chat_template.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
MAX_SIDE_BYTES = 256 << 20  # the largest in use are tokenizers of some 30 MB
SMALL_BYTES = 64 << 20  # of one that is taken by rule
MAX_SIDE_FILES = 1000
MAX_ALL_BYTES = 1 << 30

LICENCE = re.compile(
    r"(licen[cs]e|notice|copying|copyright|eula|terms|(acceptable_|prohibited_)?us(e|age)_policy|third[-_]?party)\b.*"
    r"|.*[-_. ]licen[cs]e(\.\w+)?",
    re.IGNORECASE,
)
_UNSAID = "-"  # why a file stays behind that is replaced by one of ours, or means nothing
# Written by us, or nothing that anybody would miss.
_UNREMARKABLE = {
    "config.json", lora_config.CONFIG, INDEX, MANIFEST_NAME, JOURNAL_NAME, "readme.md", "report.html", ".gitattributes",
    ".gitignore", ".ds_store",
}  # fmt: skip
_TEMPLATES = {"chat_template.jinja", "chat_template.json"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz"}
_WEIGHTS = {".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot",
            ".mlmodel", ".pb", ".engine", ".nemo", ".dduf"}  # fmt: skip
_CODE = {".py", ".pyc", ".pyw", ".pyx", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js",
         ".mjs", ".ts", ".rb", ".pl", ".ipynb", ".whl", ".egg", ".jar", ".class", ".c", ".cc", ".cpp", ".cu", ".ptx",
         ".wasm"}  # fmt: skip
_TEMPLATE_FOLDER = "additional_chat_templates"  # where transformers saves all but one, if a tokenizer has several
_TRAINING = re.compile(r"trainer_state\.json|trainer_log\.jsonl|latest|events\.out\.tfevents.*|.*\.(log|tmp|part|lock)")


def plan_side_files(plan: JobPlan) -> None:
    """Fill in the side files of a plan, and notes about what stays behind. Of the aligned model an adapter's output
    takes nothing but the licences.

    Raises:
        RequestError: a licence or a tokenizer's file lies outside of its folder.
        RunError: one cannot be read.
    """
    tuned, aligned = plan.finetuned, plan.aligned
    notes = {c.source.spec: c.index_note for c in plan.inputs.values() if isinstance(c, Checkpoint) and c.index_note}
    plan.fallbacks += [
        Fallback(asked=f"the index of {spec}", done="its headers", why=why) for spec, why in notes.items()
    ]
    whole = plan.job.writes_checkpoint
    taken: dict[str, SideFile] = {}
    own_template = _has_template(tuned.source)
    for opened in (tuned, aligned) if tuned.source.identity != aligned.source.identity else (tuned,):
        source, left = opened.source, dict[str, list[str]]()
        read = {file.name for file in opened.files}
        for name, size in sorted(source.sizes().items()):
            licence = is_licence(name)
            if name in read or not (whole or licence or opened is tuned):
                continue
            why = _reason(name, size, licence)
            if opened is aligned and name in _TEMPLATES and own_template:
                why = "the fine-tuned tokenizer has a chat template of its own"
            if why := why or _take(taken, source, name, size, licence):
                left.setdefault(why, []).append(name)
        if (
            isinstance(source, LocalSource)
            and (whole or opened is tuned)
            and (source.folder / _TEMPLATE_FOLDER).is_dir()
        ):
            left["folders are not carried along: copy it yourself"] = [_TEMPLATE_FOLDER]
        left.pop(_UNSAID, None)
        plan.fallbacks += [
            Fallback(asked=f"the files of {source.spec}", done="left behind", why=why, subject=_few(names))
            for why, names in left.items()
        ]
    plan.side_files = list(taken.values())


def _take(taken: dict[str, SideFile], source: Source, name: str, size: int, licence: bool) -> str:
    """Add a file to those taken, or say why not."""
    key = name.lower()  # some file systems know no other
    earlier = taken.get(key)
    if earlier is not None and not licence:
        return _UNSAID  # the fine-tuned model's own goes before the aligned one's
    if len(taken) >= MAX_SIDE_FILES or sum(file.size for file in taken.values()) + size > MAX_ALL_BYTES:
        return f"there are more than {MAX_SIDE_FILES} side files, or {MAX_ALL_BYTES} bytes of them"
    try:
        digest = _digest(source, name, size)
    except (RequestError, RunError) as error:
        if licence or name in SIDE_FILES:
            raise
        return "it cannot be read" if isinstance(error, RunError) else "it leads outside of the folder"
    if earlier is None:
        taken[key] = SideFile(name, source, name, size, digest)
    elif earlier.size != size or earlier.read() != source.read(name, 0, size):
        taken[f"aligned-{key}"] = SideFile(f"aligned-{name}", source, name, size, digest)
    return _UNSAID


def _reason(name: str, size: int, licence: bool) -> str:
    """Why a file stays behind; empty where it goes along."""
    low, suffix = name.lower(), PurePosixPath(name.lower()).suffix
    if low in _UNREMARKABLE:
        return _UNSAID
    if suffix in _CODE:
        return "code is never carried along: read it, then copy it yourself where `auto_map` needs it"
    if suffix in _PICKLES:
        return "pickles and arrays are never opened nor carried along"
    if suffix in _WEIGHTS or low.endswith(".index.json"):
        return "other weights than those written"
    if low.startswith("."):
        return "hidden files are not carried along"
    if _TRAINING.fullmatch(low):
        return "it belongs to the training, not to the model"
    if not name.isprintable() or len(name.encode(errors="replace")) > 200 or set(name) & set("/\\"):
        return "its name is not fit for every file system"
    if size > (MAX_SIDE_BYTES if licence or name in SIDE_FILES else SMALL_BYTES):
        return f"it is larger than {SMALL_BYTES} bytes"
    return ""


def is_licence(name: str) -> bool:
    """Whether a file is a licence, or what belongs to one."""
    return bool(LICENCE.fullmatch(name)) and PurePosixPath(name.lower()).suffix not in _CODE | _PICKLES | _WEIGHTS


def _digest(source: Source, name: str, size: int) -> str | None:
    """The hash of a local file: others are not fetched before they are written."""
    if not isinstance(source, LocalSource):
        return None
    source.local_path(name)
    return hash_bytes(source.read(name, 0, size))


def _has_template(source: Source) -> bool:
    """Whether a folder's tokenizer says how it is prompted, which a template beside it would override."""
    size = source.sizes().get("tokenizer_config.json", MAX_SIDE_BYTES + 1)
    if size > MAX_SIDE_BYTES:
        return False
    try:
        config: Any = json.loads(source.read("tokenizer_config.json", 0, size))
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _few(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
