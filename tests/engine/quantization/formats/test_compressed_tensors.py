"""The format compressed-tensors, number by number."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.quantization.formats import make_format, read_format
from engine.quantization.weight import ALL, E4M3, Scheme
from tests.engine.quantization.formats.stored import SOURCE, digit, scales, stored, words

NAME = "model.layers.0.self_attn.q_proj"
OUT, IN, GROUP = 16, 24, 8
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def config(format_name: str = "pack-quantized", inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("has_groups_of", [True, False])
def test_a_packed_weight_is_what_its_formula_says(bits, is_symmetric, has_groups_of):
    per_word, half = 32 // bits, 1 << (bits - 1)
    g_idx = torch.tensor(np.random.default_rng(0).permutation(IN) // GROUP, dtype=torch.int32)
    tensors = {
        f"{NAME}.weight_packed": words(OUT, IN // per_word),
        f"{NAME}.weight_zero_point": words(OUT // per_word, IN // GROUP, seed=1),
        f"{NAME}.weight_scale": scales(OUT, IN // GROUP, dtype=torch.bfloat16),
        f"{NAME}.weight_g_idx": g_idx,
        f"{NAME}.weight_shape": torch.tensor([OUT, IN]),
    }
    packed, zeros = (tensor.numpy() for tensor in list(tensors.values())[:2])
    expected = np.empty((OUT, IN))
    for o in range(OUT):
        for i in range(IN):
            g = g_idx[i] if has_groups_of else i // GROUP
            q = digit(packed[o, i // per_word], i % per_word, bits) - half
            zero = 0 if is_symmetric else digit(zeros[o // per_word, g], o % per_word, bits) - half
            expected[o, i] = (q - zero) * tensors[f"{NAME}.weight_scale"][o, g].item()
    found = read_format(
        config(num_bits=bits, strategy="group", group_size=GROUP, symmetric=is_symmetric,
               actorder="group" if has_groups_of else "static"), SOURCE,
    )  # fmt: skip
    weight = found.read(NAME, (OUT, IN), stored(tensors))
    np.testing.assert_array_equal(weight.dequantize().double().numpy(), expected)
    assert (weight.group_of is not None) == has_groups_of


def test_rows_that_fill_no_whole_word():
    weight = torch.arange(-6, 6, dtype=torch.int8).repeat(3, 1)
    packed = [sum((int(q) + 8) << (4 * j) for j, q in enumerate(row)) for row in (weight[0, :8], weight[0, 8:])]
    tensors = {
        f"{NAME}.weight_packed": torch.tensor([packed] * 3).to(torch.int32),
        f"{NAME}.weight_scale": torch.ones(3, 1),
        f"{NAME}.weight_zero_point": torch.tensor([[0x098]], dtype=torch.int32),  # 0, 1 and, as 0 stands for, -8
    }
    found = read_format(config(num_bits=4, strategy="channel", symmetric=False), SOURCE)
    expected = weight - torch.tensor([[0], [1], [-8]])
    assert torch.equal(found.read(NAME, (3, 12), stored(tensors)).dequantize(), expected.float())


@pytest.mark.parametrize(
    ("block", "weights", "scale_shape"),
    [
        ((ALL, ALL), {"strategy": "tensor"}, (1,)),
        ((1, ALL), {"strategy": "channel"}, (16, 1)),
        ((8, 12), {"strategy": "block", "block_structure": [8, 12]}, (2, 2)),
        ((8, 10), {"strategy": "block", "block_structure": [8, 10]}, (2, 3)),  # the last ones stick out
    ],
)
def test_e4m3_is_multiplied_by_its_scale(block, weights, scale_shape):
    numbers = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(E4M3)
    scale = scales(*scale_shape, dtype=torch.float32)
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    found = read_format(config("float-quantized", inputs, num_bits=8, type="float", **weights), SOURCE)
    assert found.scheme_of(NAME) == Scheme("float", 8, block, rounds_inputs=True)
    tensors = {f"{NAME}.weight": numbers, f"{NAME}.weight_scale": scale}
    rows, columns = block[0] or OUT, block[1] or IN
    grid = scale.reshape(-(-OUT // rows), -(-IN // columns))
    expected = [[numbers[o, i].item() * grid[o // rows, i // columns].item() for i in range(IN)] for o in range(OUT)]
    found_weight = found.read(NAME, (OUT, IN), stored(tensors)).dequantize()
    np.testing.assert_array_equal(found_weight.numpy(), np.array(expected, dtype=np.float32))


def test_integers_beside_their_zeros():
    numbers = torch.randint(-128, 128, (OUT, IN), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    zeros, scale = torch.arange(-8, 8, dtype=torch.int8).view(OUT, 1), scales(OUT, 1, dtype=torch.bfloat16)
    tensors = {f"{NAME}.weight": numbers, f"{NAME}.weight_scale": scale, f"{NAME}.weight_zero_point": zeros}
    found = read_format(config("int-quantized", TOKENS, num_bits=8, strategy="channel", symmetric=False), SOURCE)
    assert found.scheme_of(NAME) == Scheme("int", 8, (1, ALL), False, rounds_inputs=True)
    expected = (numbers.float() - zeros.float()) * scale.float()
    assert torch.equal(found.read(NAME, (OUT, IN), stored(tensors)).dequantize(), expected)


def test_each_layer_has_the_scheme_of_its_narrowest_target():
    def group(targets: list[str], size: int, **more: Any) -> dict[str, Any]:
        weights = {"num_bits": 4, "strategy": "group", "group_size": size}
        return {"targets": targets, "weights": weights, "format": "pack-quantized", **more}

    eight_bits = {"targets": ["re:.*v_proj$"], "weights": {"num_bits": 8, "strategy": "channel"},
                  "input_activations": TOKENS, "format": "int-quantized"}  # fmt: skip
    groups = {
        "a": group(["Linear"], 128), "b": eight_bits, "c": group(["model.layers.1.self_attn.v_proj"], 32),
    }  # fmt: skip
    ignore = ["lm_head", r"re:.*\.2\.mlp.*", "model.layers.1.self_attn.o_proj"]
    found = read_format(
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ignore},
        SOURCE,
    )
    assert found.scheme_of("model.layers.0.self_attn.q_proj") == Scheme("int", 4, (1, 128))
    assert found.scheme_of("model.layers.0.self_attn.v_proj") == Scheme("int", 8, (1, ALL), rounds_inputs=True)
    assert found.scheme_of("model.layers.1.self_attn.v_proj") == Scheme("int", 4, (1, 32))
    for name in ("lm_head", "model.layers.2.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        assert found.scheme_of(name) is None
    assert read_format(found.config(), SOURCE) == found


def test_a_layer_that_is_no_target_stays_as_it_is():
    values = config(num_bits=4, strategy="group", group_size=32)
    values["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    found = read_format(values, SOURCE)
    assert found.scheme_of("model.layers.0.self_attn.v_proj") is None
    assert found.scheme_of("model.layers.0.mlp.up_proj") is not None


FLOATS = TOKENS | {"type": "float"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config("nvfp4-pack-quantized", num_bits=4, type="float"), "format 'nvfp4-pack-quantized'"),
        (config("marlin-24", num_bits=4), "format 'marlin-24'"),
        (config("dense", num_bits=4), "format 'dense'"),
        (config(num_bits=3, strategy="channel"), "num_bits 3"),
        (config(num_bits=4, strategy="attn_head"), "strategy 'attn_head'"),
        (config("int-quantized", FLOATS, num_bits=8, strategy="channel"), "type 'float'"),
        (config("int-quantized", TOKENS, num_bits=4, strategy="channel"), "num_bits 4"),
        (config("float-quantized", FLOATS, num_bits=8, type="float", symmetric=False), "symmetric False"),
        (config("float-quantized", FLOATS, num_bits=8, type="float", strategy="block"), "block_structure None"),
        (config(num_bits=4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (config(num_bits=4) | {"transform_config": {"config_groups": {"u": {}}}}, "transforms"),
        (config(num_bits=4) | {"config_groups": {}}, "config_groups"),
    ],
)
def test_other_layouts_are_refused(values, message):
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        read_format(values, SOURCE)


def test_what_is_written_says_how_inputs_are_rounded():
    rows = make_format("compressed-tensors", Scheme("float", 8, (1, ALL), rounds_inputs=True)).config()
    assert rows["format"] == "float-quantized"
    assert rows["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    packed = make_format("compressed-tensors", Scheme("int", 4, (1, 64))).config()
    assert packed["config_groups"]["group_0"]["input_activations"] is None
    assert packed["ignore"] == ["lm_head"]
