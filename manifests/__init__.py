"""What happened in a job: errors, hashes, manifest, journal, verification, rendering, model card."""

from safeshard.manifests.card import card
from safeshard.manifests.errors import Offence, RequestError, RunError, SafeshardError, printable
from safeshard.manifests.hashing import hash_bytes, hash_tensor_region, header_sha256
from safeshard.manifests.render import render, render_summary
from safeshard.manifests.schema import (
    MANIFEST_NAME,
    Fallback,
    FileEntry,
    Input,
    InputFile,
    Manifest,
    Method,
    ModuleEntry,
    Run,
    TensorEntry,
    Tool,
    json_schema,
    load,
)
from safeshard.manifests.verify import Finding, verify

__all__ = [
    "MANIFEST_NAME",
    "Fallback",
    "FileEntry",
    "Finding",
    "Input",
    "InputFile",
    "Manifest",
    "Method",
    "ModuleEntry",
    "Offence",
    "RequestError",
    "Run",
    "RunError",
    "SafeshardError",
    "TensorEntry",
    "Tool",
    "card",
    "hash_bytes",
    "hash_tensor_region",
    "header_sha256",
    "json_schema",
    "load",
    "printable",
    "render",
    "render_summary",
    "verify",
]
