"""Every Triton kernel compiles for sm_80 and sm_90 without spilling registers; no GPU is needed.

A module of `safeshard.kernels` takes part by exposing `COMPILE_CASES`, a list of

    (kernel, signature, constexprs, options)

    kernel      the @triton.jit function
    signature   {argument: type} of the arguments that a launch passes at run time: "*bf16", "*fp32", "*fp64", "i32",
                "i64", "fp32", ...; pointers are taken as 16-byte aligned, as torch allocates them
    constexprs  {argument: value} of all others: tl.constexpr arguments, and arguments that a launch specialises
                (a stride equal to 1 becomes the constant 1)
    options     launch options: {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}; {} for the defaults

All cases of one architecture compile in one child process, because this one may have TRITON_INTERPRET=1 set. By hand:

    python tests/kernels/test_compile.py 90
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import safeshard.kernels

ARCHITECTURES = (80, 90)


def find_cases() -> Iterator[tuple[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]]:
    """Yield (id, case) of every case of every kernel module, in a fixed order."""
    for info in sorted(pkgutil.iter_modules(safeshard.kernels.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"safeshard.kernels.{info.name}")
        for index, case in enumerate(getattr(module, "COMPILE_CASES", [])):
            yield f"{info.name}-{index}-{case[0].__name__}", case


def compile_case(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, Any], architecture: int
) -> dict[str, int]:
    """Compile one case and return its use of registers, stack and local memory (spills go there), in bytes a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = set(kernel.arg_names) ^ (set(signature) | set(constexprs))
    if unknown or set(signature) & set(constexprs):
        raise ValueError(f"arguments missing, unknown or given twice: {sorted(unknown) or sorted(signature)}")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, types, constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return resource_usage(compiled.asm["cubin"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of a compiled kernel, read from its binary by the bundled cuobjdump."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", listing)[1]) for name in ("REG", "STACK", "LOCAL", "SHARED")}  # type: ignore[index]


def compile_all(architecture: int) -> dict[str, dict[str, int] | str]:
    """Resource usage of every case, or the error that stopped it, by case id."""
    results: dict[str, dict[str, int] | str] = {}
    for name, case in find_cases():
        try:
            results[name] = compile_case(*case, architecture)
        except Exception as error:  # every case is reported, whatever stopped it
            results[name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict[str, Any]]:
    """What `compile_all` reports for each architecture, the architectures in parallel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    children = {
        architecture: subprocess.Popen(
            [sys.executable, __file__, str(architecture)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for architecture in ARCHITECTURES
    }
    outputs = {architecture: child.communicate()[0] for architecture, child in children.items()}
    assert all(child.returncode == 0 for child in children.values()), "compiling failed: see the captured stderr"
    return {architecture: json.loads(output.splitlines()[-1]) for architecture, output in outputs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [name for name, _ in find_cases()])
def test_compiles_without_spills(compiled: dict[int, dict[str, Any]], case: str, architecture: int) -> None:
    usage = compiled[architecture][case]
    assert isinstance(usage, dict), usage
    assert usage["STACK"] == usage["LOCAL"] == 0, usage


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
