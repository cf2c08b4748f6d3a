"""Every kernel, launched as for Llama 70B, compiles to what it should; no device is needed.

The launches are those that the operations make for each architecture (`launches.py`), and the binaries are read with
the tools that Triton brings (`binaries.py`). Architectures compile two at a time, in forks of a process of their own,
because this one may have TRITON_INTERPRET=1 set. By hand, every figure:

    python tests/kernels/test_compile.py all 90 gfx942
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from launches import MORE, OPERATIONS, device
from triton.backends.compiler import GPUTarget

Figures = dict[str, list[dict[str, Any]]]  # operation -> its launches, in order

FAST = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
# The bytes of shared memory a program may use: NVIDIA's by compute capability, AMD's local data share.
SHARED = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10,
}  # fmt: skip
ALL = [
    GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 32 if arch[3:5] == "11" else 64)
    for arch in SHARED
]
MATRIX = {80: "HMMA", 90: "HGMMA"}  # in the binary
PTX = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}  # in what it is made of
# Instructions of the product's loop, which takes one 64 x 32 tile of V, by the columns of X it serves: what the
# compiler makes of it today and a tenth. Eight warps over 32 columns took 425 for half as many.
LOOP = {80: {16: 510, 64: 1030}, 90: {16: 450, 128: 940}}


def compile_all(architecture: GPUTarget, every: bool) -> Figures:
    """The figures of each operation's launches; of those with equal code, once.

    `every` takes more operations, and does not disassemble binaries, which takes as long as compiling.
    """
    from binaries import compile_launch, specialise

    done: dict[str, dict[str, Any]] = {}
    results: Figures = {}
    for name, operation in (OPERATIONS | (MORE if every else {})).items():
        with device(architecture) as launches:
            operation()
        for launch in launches:
            key = f"{launch.kernel.__name__} {specialise(launch)}"
            if key not in done:
                done[key] = {
                    "kernel": launch.kernel.__name__, "settings": launch.settings,
                    **compile_launch(launch, architecture, disassembled=not every),
                }  # fmt: skip
            results.setdefault(name, []).append(done[key])
    return results


def in_children(architectures: list[GPUTarget], every: bool) -> dict[int | str, Figures]:
    """What `compile_all` gives for each architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "all" if every else "fast", *(str(a.arch) for a in architectures)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert not done.returncode, "compiling failed: see the captured stderr"
    figures = json.loads(done.stdout.splitlines()[-1])
    return {a.arch: own for a, own in zip(architectures, figures, strict=True)}


@pytest.fixture(scope="module")
def compiled() -> dict[int | str, Figures]:
    return in_children(FAST, every=False)


def launches_of(figures: Figures, kernel: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, own) for name, all_ in figures.items() for own in all_ if own["kernel"] == kernel)


def check(figures: Figures, arch: int | str, matrix: Mapping[int, str]) -> None:
    """What holds on every architecture: registers suffice, shared memory too, and matrix instructions multiply."""
    for name, all_ in figures.items():
        for own in all_:
            assert own["spilled"] == 0, (name, own)
            assert own["shared"] <= SHARED[arch], (name, own)
    products = [launches_of(figures, kernel) for kernel in ("_product_kernel", "_coded_product_kernel", "_gram_kernel")]
    for name, own in chain(*products):
        if arch in matrix and name != "gram fp32":
            assert all(instruction.startswith(matrix[arch]) for instruction in own["matrix"]), (name, own)
            assert own["matrix"], (name, own)


@pytest.mark.parametrize("architecture", FAST, ids=lambda a: str(a.arch))
def test_registers_and_shared_memory_suffice(compiled: dict[int | str, Figures], architecture: GPUTarget) -> None:
    figures = compiled[architecture.arch]
    assert figures.keys() == OPERATIONS.keys()
    check(figures, architecture.arch, MATRIX)


def narrow(own: dict[str, Any], bits: int) -> int:
    """Loads of fewer bits."""
    return sum(count for width, count in own["loads"].items() if int(width) < bits)


@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_large_is_loaded_in_whole_vectors(compiled: dict[int | str, Figures], arch: int) -> None:
    for name in ("gram bf16", "merge", "columns"):
        for own in compiled[arch][name]:
            assert narrow(own, 128) == 0, (name, own)
    for name, own in launches_of(compiled[arch], "_product_kernel"):
        # Weights by rows reach Hopper's tensor cores through registers; their pieces there are of 64 bits.
        assert narrow(own, 64 if arch == 90 and not own["settings"]["NORM"] else 128) == 0, (name, own)


@pytest.mark.parametrize(("arch", "columns"), [(arch, columns) for arch, own in LOOP.items() for columns in own])
def test_instructions_a_tile(compiled: dict[int | str, Figures], arch: int, columns: int) -> None:
    loops = [
        own["loop"]
        for _, own in launches_of(compiled[arch], "_product_kernel")
        if own["settings"]["BLOCK_R"] == columns
    ]
    assert loops
    assert 0 < min(loops) <= max(loops) <= LOOP[arch][columns], loops


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("name", "most"), [("gate of fp8", 1170), ("gate of MXFP4", 700)])
def test_codes_are_decoded_in_registers(compiled: dict[int | str, Figures], arch: int, name: str, most: int) -> None:
    """Codes are loaded four at least at a time (of MXFP4 eight), scales once a block; nothing is decoded twice."""
    own = [each for each in compiled[arch][name] if each["kernel"] == "_coded_product_kernel"]
    assert [each["settings"]["TRANSPOSED"] for each in own] == [True, False]
    for each in own:
        assert narrow(each, 32) <= (2 if name == "gate of MXFP4" else 0), each  # the scales
        assert 0 < each["loop"] <= most, each


def test_a_tile_of_hopper_is_twelve_matrix_instructions_whatever_its_width(
    compiled: dict[int | str, Figures],
) -> None:
    """Three for each 8 of the tile's 32 summed columns. Work done twice would show here."""
    for kernel in ("_product_kernel", "_coded_product_kernel"):
        for name, own in launches_of(compiled[90], kernel):
            assert sum(own["matrix"].values()) == 12, (name, own)


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_the_norm_is_summed_alike_whatever_the_batch(compiled: dict[int | str, Figures], arch: int | str) -> None:
    """Squares lie in registers in one layout at each width: so |V|^2 has the same bits for 1 adapter and for 64."""
    layouts = {
        (own["settings"]["BLOCK_R"], *own["layouts"])
        for _, own in launches_of(compiled[arch], "_product_kernel")
        if own["settings"]["NORM"]
    }
    assert len({width for width, *_ in layouts}) > 1
    assert len({tuple(layout) for _, *layout in layouts}) == 1, layouts


@pytest.mark.slow
def test_more_shapes_on_every_architecture() -> None:
    for arch, figures in in_children(ALL, every=True).items():
        assert figures.keys() == OPERATIONS.keys() | MORE.keys()
        check(figures, arch, PTX)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import binaries  # noqa: F401

    kind, *names = sys.argv[1:]
    given = [next(a for a in ALL if str(a.arch) == name) for name in names]
    with device(given[0]):
        OPERATIONS["gate 16"]()  # imports what the forks need
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.starmap(compile_all, [(a, kind == "all") for a in given], chunksize=1)))
