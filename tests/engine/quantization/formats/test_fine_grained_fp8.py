"""The formats fp8 and fbgemm_fp8, number by number."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.quantization.formats import read_format
from engine.quantization.weight import ALL, E4M3, Scheme
from tests.engine.quantization.formats.stored import SOURCE, scales, stored

NAME = "model.layers.0.self_attn.q_proj"


def config(**values: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [4, 8], "fmt": "e4m3"} | values


def weight(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(E4M3)


@pytest.mark.parametrize("shape", [(8, 16), (10, 19)])
def test_a_weight_is_multiplied_by_the_scale_of_its_block(shape):
    """Blocks of published models stick out, as those of DeepSeek's kv_a_proj_with_mqa do."""
    numbers, scale = weight(*shape), scales(-(-shape[0] // 4), -(-shape[1] // 8), dtype=torch.float32)
    tensors = {f"{NAME}.weight": numbers, f"{NAME}.weight_scale_inv": scale}
    found = read_format(config(), SOURCE).read(NAME, shape, stored(tensors))
    expected = [[numbers[o, i].item() * scale[o // 4, i // 8].item() for i in range(shape[1])] for o in range(shape[0])]
    np.testing.assert_array_equal(found.dequantize().numpy(), np.array(expected, dtype=np.float32))


def test_without_blocks_one_number_scales_all():
    numbers = weight(8, 16)
    tensors = {f"{NAME}.weight": numbers, f"{NAME}.weight_scale_inv": torch.tensor(0.25)}
    found = read_format(config(weight_block_size=None, activation_scheme="static"), SOURCE)
    assert torch.equal(found.read(NAME, (8, 16), stored(tensors)).dequantize(), numbers.float() / 4)


def test_fbgemm_scales_rows():
    numbers, scale = weight(8, 16), scales(8, 1, dtype=torch.float32)
    tensors = {f"{NAME}.weight": numbers, f"{NAME}.weight_scale": scale}
    found = read_format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, SOURCE)
    assert found.scheme_of(NAME) == Scheme("float", 8, (1, ALL), rounds_inputs=True)
    assert torch.equal(found.read(NAME, (8, 16), stored(tensors)).dequantize(), numbers.float() * scale)


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_layers_may_be_left_out(key):
    found = read_format(config(**{key: ["model.layers.1.mlp", "lm_head"]}), SOURCE)
    assert found.scheme_of("model.layers.1.mlp.up_proj") is None
    assert found.scheme_of("model.layers.11.mlp.up_proj") is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        ({"weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"weight_block_size": [0, 128]}, "weight_block_size"),
    ],
)
def test_other_layouts_are_refused(values, message):
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        read_format(config(**values), SOURCE)
