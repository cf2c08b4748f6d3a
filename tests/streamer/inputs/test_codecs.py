"""Codecs against the libraries of the formats, and against plain arithmetic; round trips byte for byte."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.streamer.inputs.codecs.base import Codec, reencode
from safeshard.streamer.inputs.codecs.int4 import PackedInt4
from safeshard.streamer.inputs.codecs.mxfp4 import Mxfp4
from safeshard.streamer.inputs.codecs.scaled import Scaled

CODECS: dict[str, Codec] = {
    "fp8 block": Scaled("", 4, 8, ".weight_scale_inv"),
    "fp8 block, powers of two": Scaled("", 4, 8, ".weight_scale_inv", powers=True),
    "fp8 block, scales in a byte": Scaled("", 4, 8, ".weight_scale_inv", powers=True),
    "fp8 tensor": Scaled("", 0, 0),
    "fp8 row": Scaled("", 1, 0),
    "int8 row": Scaled("", 1, 0),
    "mxfp4": Mxfp4(),
    "int4 group": PackedInt4(16),
    "int4 row": PackedInt4(0),
}
BYTES = ("mxfp4", "fp8 block, scales in a byte")
SCALES = {"mxfp4": torch.uint8, "int4 group": torch.bfloat16, "int4 row": torch.float16, "fp8 row": torch.bfloat16}


def stored_bytes(name: str, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """A weight of any bytes that its format allows, but for NaN."""
    generator = torch.Generator().manual_seed(seed)
    codec = CODECS[name]
    shapes = {part: each[0] for part, each in codec.shapes((rows, columns)).items()}
    count = math.prod(shapes["values"])
    codes = torch.randint(0, 256, (count * (4 if "int4" in name else 1),), generator=generator, dtype=torch.uint8)
    scales = torch.randn(shapes["scales"], generator=generator).abs() * 10.0 ** torch.randint(
        -6, 3, shapes["scales"], generator=generator
    )
    dtype = SCALES.get(name, torch.float32)
    if name in BYTES:
        dtype = torch.uint8
        scales = torch.randint(0, 245, shapes["scales"], generator=generator, dtype=torch.uint8)
    if "int4" in name:
        codes = codes.view(torch.int32)
    elif "fp8" in name:
        codes[(codes & 0x7F) == 0x7F] = 0
        codes = codes.view(torch.float8_e4m3fn)
    elif name != "mxfp4":
        codes = codes.view(torch.int8)
    return {"values": codes.view(shapes["values"]), "scales": scales.to(dtype)}


def same_bytes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(
        a[part].dtype == b[part].dtype and a[part].shape == b[part].shape and raw(a[part]) == raw(b[part]) for part in a
    )


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 11), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_decoding_and_encoding_again_gives_every_byte(name: str, rows: int, groups: int, seed: int) -> None:
    codec, stored = CODECS[name], stored_bytes(name, rows, 32 * groups, seed)
    result = reencode(codec, codec.decode(stored), [stored])
    assert same_bytes(result.stored, stored)
    assert (result.changed, result.error) == (0, 0.0)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 11), groups=st.integers(1, 3), seed=st.integers(0, 2**31), value=st.floats(-3, 3, width=32))
def test_one_changed_value_changes_its_block_alone(name: str, rows: int, groups: int, seed: int, value: float) -> None:
    codec, columns = CODECS[name], 32 * groups
    stored = stored_bytes(name, rows, columns, seed)
    values = codec.decode(stored)
    before, (row, column) = values.clone(), (seed % rows, seed % columns)
    values[row, column] = value
    result = reencode(codec, values, [stored])
    height, width = codec.block((rows, columns))
    top, left = row // height * height, column // width * width
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    after = codec.decode(result.stored)
    assert torch.equal(after[~inside].view(torch.int32), before[~inside].view(torch.int32))
    assert result.changed == int(before[row, column].view(torch.int32) != values[row, column].view(torch.int32))
    assert result.error == pytest.approx(float((after - values)[inside].double().square().sum()), rel=1e-12)
    assert result.blocks == math.ceil(rows / height) * math.ceil(columns / width)


@pytest.mark.parametrize("name", CODECS)
def test_a_block_that_another_weight_holds_takes_its_bytes(name: str) -> None:
    codec, ours, theirs = CODECS[name], stored_bytes(name, 9, 64, 1), stored_bytes(name, 9, 64, 2)
    result = reencode(codec, codec.decode(theirs), [ours, theirs])
    assert same_bytes(result.stored, theirs)
    assert result.changed == result.blocks
    assert result.error == 0.0


@pytest.mark.parametrize(
    ("name", "steps"),
    # Half the distance of neighbouring values at the top of a block, as a fraction of its largest value.
    [("fp8 block", 16 / 448), ("fp8 block, scales in a byte", 16 / 224), ("fp8 tensor", 16 / 448),
     ("fp8 row", 16 / 448 + 2**-8),
     ("int8 row", 0.5 / 127), ("mxfp4", 1 / 3), ("int4 group", 0.5 / 7 + 2**-8), ("int4 row", 0.5 / 7 + 2**-8)],
)  # fmt: skip
def test_encoded_values_are_near(name: str, steps: float) -> None:
    codec, stored = CODECS[name], stored_bytes(name, 9, 64, 3)
    values = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    decoded = codec.decode(codec.encode(values, stored))
    height, width = codec.block((9, 64))
    for top in range(0, 9, height):
        for left in range(0, 64, width):
            block = (slice(top, top + height), slice(left, left + width))
            assert (decoded[block] - values[block]).abs().max() <= steps * values[block].abs().max() * (1 + 1e-6)


@pytest.mark.parametrize("name", [n for n in CODECS if n not in BYTES])
def test_encoding_what_fills_its_range_gives_the_same_bytes_without_help(name: str) -> None:
    """Where a block's largest value has the largest code, amax / top is its scale again, up to the last bit."""
    codec = CODECS[name]
    stored = stored_bytes(name, 8, 64, 5)
    top = {"int4": 7.0, "int8": 127.0}.get(name[:4], 448.0)
    stored["scales"] = torch.exp2(torch.randint(-5, 5, stored["scales"].shape).float()).to(stored["scales"].dtype)
    values = codec.decode(stored)
    height, width = codec.block((8, 64))
    scales = codec.decode(stored | {"values": codec.encode(torch.ones(8, 64), stored)["values"]}) / top
    values[::height, ::width] = top * scales[::height, ::width]
    values.clamp_(-top * scales, top * scales)
    encoded = codec.encode(values, stored)
    assert torch.equal(codec.decode(encoded).view(torch.int32), values.view(torch.int32))


def test_blocks_of_zeros_encode_as_zeros() -> None:
    for name, codec in CODECS.items():
        stored = stored_bytes(name, 4, 64, 6)
        encoded = codec.encode(torch.zeros(4, 64), stored)
        assert not codec.decode(encoded).any(), name
        assert encoded["scales"].float().isfinite().all()


def test_fp8_nan_stays_nan() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64).view(torch.float8_e4m3fn)
    decoded = Scaled("", 0, 0).decode({"values": codes, "scales": torch.tensor(0.5)})
    expected = codes.float() * 0.5
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert decoded.isnan().sum() == 2
    assert torch.equal(decoded.nan_to_num(), expected.nan_to_num())


def test_fp8_blocks_against_transformers() -> None:
    quantizer = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=generator) * 1e-2
    theirs = quantizer.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    ours = Scaled("", 128, 128, ".weight_scale_inv").decode({"values": weight, "scales": scales})
    assert torch.equal(ours, theirs)


def test_mxfp4_against_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # E x in x out
    for expert in range(2):
        ours = Mxfp4().decode({"values": blocks[expert], "scales": scales[expert]})
        assert torch.equal(ours.bfloat16(), theirs[expert].T)


@pytest.mark.parametrize(
    ("name", "format_", "args"),
    [
        ("fp8 tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("fp8 row", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("int8 row", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("int4 group", "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
        ("int4 row", "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
        ("mxfp4", "mxfp4-pack-quantized",
         {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    ],
)  # fmt: skip
def test_against_compressed_tensors(name: str, format_: str, args: dict[str, object]) -> None:
    """Decoding gives what the library does, rounded to the scales' dtype as it rounds; encoding is decoded by it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressor = compressors.BaseCompressor.get_value_from_registry(format_)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(symmetric=True, **args)
    )
    codec, stored = CODECS[name], stored_bytes(name, 8, 64, 7)
    if name == "mxfp4":
        stored["scales"] = stored["scales"] // 16 + 119
        stored["values"] = stored["values"].view(8, -1)
    for each in (stored, codec.encode(torch.randn(8, 64), stored)):
        given = {codec.names[part].removeprefix("."): tensor for part, tensor in each.items()}
        if "int4" in name:
            given["weight_shape"] = torch.tensor([8, 64])
        theirs = compressor.decompress(given, scheme)["weight"]
        assert torch.equal(codec.decode(each).to(theirs.dtype), theirs)
