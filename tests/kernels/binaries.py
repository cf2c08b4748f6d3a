"""What a launch compiles to for a device that is not here: registers, memory, and the instructions of the binary.

A launch is specialised as Triton does it: an integer 1 becomes a constant, and multiples of 16 are known as such,
as tensors are, which torch aligns.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from launches import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.bool: "*i1", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, Any]]:
    """Signature, constants, what is known of arguments, and compiler options."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.settings
    options = {name: value for name, value in launch.settings.items() if name not in kernel.arg_names}
    signature, constants, known = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                known[(index,)] = ALIGNED
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = param.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if value % 16 == 0 and not param.do_not_specialize:
                known[(index,)] = ALIGNED
    return signature, constants, known, options


def compile_launch(launch: Launch, architecture: GPUTarget, disassembled: bool = True) -> dict[str, Any]:
    """The figures of one launch; of NVIDIA's without `disassembled`, which takes most of the time, the first four:

    registers  a thread
    spilled    bytes a thread keeps in memory for want of registers
    shared     bytes a program
    matrix     matrix instructions, by name: the binary's, or else PTX's, each of which is one of the binary's or more
    loads      of global memory, by width in bits
    loop       instructions of the longest loop
    layouts    of operands of reductions
    """
    signature, constants, known, options = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, known)
    compiled = triton.compile(source, target=architecture, options=options)
    if architecture.backend != "cuda":
        own = _amd(compiled.asm["amdgcn"])
    else:
        own = _nvidia(compiled.asm["cubin"]) if disassembled else _undisassembled(compiled.asm)
    return {**own, "shared": compiled.metadata.shared, "layouts": _reduced_layouts(compiled.asm["ttgir"])}


def _nvidia(cubin: bytes) -> dict[str, Any]:
    """Kept beside what Triton has compiled: reading takes as long as all else."""
    cache = get_cache_manager(hashlib.sha256(Path(__file__).read_bytes() + cubin).hexdigest())
    if kept := cache.get_file("figures.json"):
        figures: dict[str, Any] = json.loads(Path(kept).read_text())
        return figures
    figures = _read(cubin)
    cache.put(json.dumps(figures), "figures.json", binary=False)
    return figures


def _read(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _usage(file.name)
        instructions, loop = _instructions(_run("nvdisasm", "-c", file.name))
    names = [re.sub(r"^@!?U?P[0-9T]+\s+", "", text).split()[0] for text in instructions]
    return usage | {
        "loop": loop, "loads": Counter(_width(name) for name in names if re.match(r"LDG(STS)?\.", name)),
        "matrix": Counter(name for name in names if re.match(r"(U?H?G?MMA|UTC\w*MMA|DMMA)", name)),
    }  # fmt: skip


def _undisassembled(asm: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _usage(file.name)
    names = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+", asm["ptx"])
    return usage | {"matrix": Counter(names)}


def _usage(cubin: str) -> dict[str, int]:
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    used = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / tool), *args], check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> tuple[list[str], int]:
    """All instructions, and how many the longest backward branch spans."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif text := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(text[1])
    spans = [0]
    for place, text in enumerate(found):
        jump = re.search(r"BRA.*?`\((\.L_x_\d+)\)", text)
        if jump and labels.get(jump[1], place) < place:
            spans.append(place - labels[jump[1]] + 1)
    return found, max(spans)


def _width(name: str) -> int:
    """Bits that a load moves a thread: the name ends in it, but for 32 and for signed or unsigned bytes and halves."""
    parts = name.split(".")
    return next((int(part.lstrip("US")) for part in parts if part.lstrip("US") in ("8", "16", "64", "128", "256")), 32)


def _amd(listing: str) -> dict[str, Any]:
    """From the assembler text and the description that ends it."""
    described = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", listing)}
    names = re.findall(r"^\s+([a-z]\w+)", listing, re.MULTILINE)
    widths = {"dwordx4": 128, "b128": 128, "dwordx2": 64, "b64": 64, "ushort": 16, "u16": 16, "ubyte": 8, "u8": 8}
    loads = [name for name in names if re.match(r"(global|buffer)_load", name)]
    return {
        "registers": described["vgpr_count"],
        "spilled": described["private_segment_fixed_size"], "loop": 0,
        "loads": Counter(next((w for part, w in widths.items() if part in name), 32) for name in loads),
        "matrix": Counter(name for name in names if re.match(r"v_s?w?mfmac?_|v_wmma", name)),
    }  # fmt: skip


def _reduced_layouts(ttgir: str) -> list[str]:
    """The layouts of what reductions add up, spelled out: they decide the order of additions."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r'"tt\.reduce"\(.*?^\s*\}\) : \((.*?)\)', ttgir, re.MULTILINE | re.DOTALL)
    return [re.sub(r"#\w+", lambda name: names.get(name[0], name[0]), operand) for operand in operands]
