"""Which tensors are a quantised weight, as releases name them, and which formats are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from safeshard.manifests.safetensors_header import ITEM_BITS, TensorRef
from safeshard.streamer.inputs.codecs import Encoding, Refused, encoding, schemes

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def tensors(**named: tuple[str, tuple[int, ...]]) -> dict[str, TensorRef]:
    refs, offset = {}, 8
    for key, (dtype, shape) in named.items():
        nbytes = ITEM_BITS[dtype] // 8
        for size in shape:
            nbytes *= size
        name = "m" + key.replace("__", ".")
        refs[name] = TensorRef(name, dtype, shape, "f", offset, nbytes)
        offset += nbytes
    return refs


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}


@pytest.mark.parametrize(
    ("given", "config", "name", "shape"),
    [
        # DeepSeek V3, Qwen3-FP8
        ({"__weight": ("F8_E4M3", (300, 256)), "__weight_scale_inv": ("F32", (3, 2))}, FP8,
         "fp8 in blocks of 128 x 128", (300, 256)),
        ({"__weight": ("F8_E4M3", (256, 256)), "__weight_scale_inv": ("F8_E8M0", (2, 2))}, {"text_config": FP8},
         "fp8 in blocks of 128 x 128", (256, 256)),
        # fused experts in fp8
        ({"": ("F8_E4M3", (4, 256, 128)), "_scale_inv": ("F32", (4, 2, 1))}, FP8,
         "fp8 in blocks of 128 x 128", (4, 256, 128)),
        # llm-compressor, ModelOpt and FBGEMM
        ({"__weight": ("F8_E4M3", (8, 16)), "__weight_scale": ("F32", ())}, {}, "fp8 by tensor", (8, 16)),
        ({"__weight": ("F8_E4M3", (8, 16)), "__weight_scale": ("BF16", (1,))}, {}, "fp8 by tensor", (8, 16)),
        ({"__weight": ("F8_E4M3", (8, 16)), "__weight_scale": ("BF16", (8, 1))}, {}, "fp8 by row", (8, 16)),
        ({"__weight": ("F8_E4M3", (8, 16)), "__weight_scale": ("F32", (2, 4))},
         compressed(block_structure=[4, 4], strategy="block"), "fp8 in blocks of 4 x 4", (8, 16)),
        ({"__weight": ("I8", (8, 16)), "__weight_scale": ("BF16", (8, 1))}, {}, "int8 by row", (8, 16)),
        # GPT-OSS
        ({"_blocks": ("U8", (4, 6, 2, 16)), "_scales": ("U8", (4, 6, 2))}, {}, "MXFP4", (4, 6, 64)),
        ({"__weight_packed": ("U8", (6, 32)), "__weight_scale": ("U8", (6, 2))}, {}, "MXFP4", (6, 64)),
        # Kimi K2
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 2)), "__weight_shape": ("I64", (2,))},
         compressed(num_bits=4, group_size=32, symmetric=True), "int4 in groups of 32", (6, 64)),
        # experts in int4 beside attention in fp8
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 2))},
         {"quantization_config": {"config_groups": {
             "a": {"weights": {"num_bits": 8, "type": "float"}}, "b": {"weights": {"num_bits": 4, "group_size": 32}}}}},
         "int4 in groups of 32", (6, 64)),
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 1))},
         compressed(num_bits=4, group_size=None, symmetric=True), "int4 by row", (6, 64)),
    ],
)  # fmt: skip
def test_formats_as_releases_store_them(given: Any, config: Any, name: str, shape: tuple[int, ...]) -> None:
    found = encoding("m", tensors(**given), schemes(config))
    assert isinstance(found, Encoding), found
    assert (found.codec.name, found.shape) == (name, shape)
    assert {ref.name for ref in found.refs.values()} == {
        "m" + key.replace("__", ".") for key in given if key != "__weight_shape"
    }


def test_an_expert_is_a_region_of_each_part() -> None:
    given = tensors(_blocks=("U8", (4, 6, 2, 16)), _scales=("U8", (4, 6, 2)))
    found = encoding("m", given, [])
    assert isinstance(found, Encoding)
    third = found.expert(3)
    assert third.shape == (6, 64)
    blocks, scales = third.refs["values"], third.refs["scales"]
    assert (blocks.shape, blocks.nbytes, blocks.offset) == ((6, 2, 16), 192, given["m_blocks"].offset + 3 * 192)
    assert (scales.shape, scales.nbytes, scales.offset) == ((6, 2), 12, given["m_scales"].offset + 3 * 12)


def test_plain_weights_have_no_encoding() -> None:
    assert encoding("m", tensors(__weight=("BF16", (8, 8))), schemes(FP8)) is None
    assert encoding("m", tensors(__bias=("BF16", (8,))), schemes(FP8)) is None


@pytest.mark.parametrize(
    ("given", "config", "got"),
    [
        ({"_blocks": ("U8", (16, 4)), "_scales": ("U8", (4,)), "__weight": ("F8_E5M2", (4,))}, {},
         "F8_E5M2 without a scale"),
        ({"__weight_packed": ("I32", (8,))}, {}, "packed values of shape [8]"),
        ({"__weight": ("F8_E4M3", (5000, 1, 1)), "__weight_scale": ("F32", (5000,))}, {},
         "fp8 by tensor of shape [5000, 1, 1]"),
        ({"__weight": ("U8", (8, 8)), "__weight_scale": ("F8_E4M3", (8, 1)), "__weight_scale_2": ("F32", ())}, {},
         "NVFP4"),
        ({"__weight_packed": ("U8", (8, 8)), "__weight_global_scale": ("F32", (1,))}, {}, "NVFP4"),
        ({"__qweight": ("I32", (8, 8)), "__qzeros": ("I32", (1, 1)), "__scales": ("F16", (1, 8))}, {},
         "GPTQ or AWQ, with zero points"),
        ({"__weight": ("U8", (32, 1)), "__weight.absmax": ("F32", (1,))}, {}, "bitsandbytes"),
        ({"__weight": ("I8", (8, 8)), "__SCB": ("F32", (8,))}, {}, "bitsandbytes (int8)"),
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 2)), "__weight_zero_point": ("I32", (1,))},
         {}, "quantised with zero points"),
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 2)), "__weight_g_idx": ("I32", (64,))},
         {}, "int4 with reordered columns (actorder)"),
        ({"__weight_packed": ("I32", (6, 16)), "__weight_scale": ("BF16", (6, 2))}, compressed(num_bits=8),
         "packed integers of 8 bits"),
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 2))},
         compressed(num_bits=4, symmetric=False), "int4 with zero points"),
        ({"__weight_packed": ("I32", (6, 8)), "__weight_scale": ("BF16", (6, 2))},
         compressed(num_bits=4, group_size=128), "int4 in groups of 32, where config.json says 128"),
        ({"__weight": ("F8_E4M3", (8, 8))}, {}, "F8_E4M3 without a scale"),
        ({"__weight": ("F8_E5M2", (8, 8)), "__weight_scale": ("F32", ())}, {}, "fp8 in F8_E5M2"),
        ({"__weight": ("F8_E4M3", (256, 256)), "__weight_scale_inv": ("F32", (2, 2))}, {},
         "fp8 in blocks, without weight_block_size in config.json"),
        ({"__weight": ("F8_E4M3", (256, 256)), "__weight_scale_inv": ("F32", (3, 2))}, FP8,
         "[3, 2], where fp8 in blocks of 128 x 128 has [2, 2]"),
        ({"__weight": ("F8_E4M3", (8, 8)), "__weight_scale": ("I32", ())}, {}, "fp8 by tensor with scales in I32"),
        ({"_blocks": ("U8", (4, 6, 2, 16))}, {}, "MXFP4 without it"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(given: Any, config: Any, got: str) -> None:
    found = encoding("m", tensors(**given), schemes(config))
    assert isinstance(found, Refused), found
    assert found.got == got
    assert found.remedy
