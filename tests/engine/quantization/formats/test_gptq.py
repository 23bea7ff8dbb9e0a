"""The format gptq, number by number."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from engine.quantization.formats import make_format, read_format
from engine.quantization.weight import ALL, QuantizedWeight, Scheme
from tests.engine.quantization.formats.stored import SOURCE, digit, scales, stored, words

NAME = "model.layers.0.self_attn.q_proj"
OUT, IN, GROUP = 16, 24, 8


def config(**values: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False} | values


def checkpoint(bits: int = 4) -> dict[str, torch.Tensor]:
    """Any numbers, and groups of inputs from anywhere. No zero borrows from another, which has a test of its own."""
    per_word = 32 // bits
    qzeros = words(IN // GROUP, OUT // per_word, seed=1) & 0x77777777
    return {
        f"{NAME}.qweight": words(IN // per_word, OUT),
        f"{NAME}.qzeros": qzeros,
        f"{NAME}.scales": scales(IN // GROUP, OUT),
        f"{NAME}.g_idx": torch.tensor(np.random.default_rng(0).permutation(IN) // GROUP, dtype=torch.int32),
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("version", "lacking"), [("gptq", 1), (None, 1), ("gptq_v2", 0)])
def test_a_weight_is_what_its_formula_says(bits, version, lacking):
    tensors = checkpoint(bits)
    qweight, qzeros, scale, g_idx = (tensor.numpy() for tensor in tensors.values())
    per_word = 32 // bits
    expected = np.empty((OUT, IN))
    for o in range(OUT):
        for i in range(IN):
            g = g_idx[i]
            q = digit(qweight[i // per_word, o], i % per_word, bits)
            zero = digit(qzeros[g, o // per_word], o % per_word, bits) + lacking
            expected[o, i] = float(scale[g, o]) * (q - zero)
    found = read_format(config(bits=bits, checkpoint_format=version), SOURCE)
    weight = found.read(NAME, (OUT, IN), stored(tensors))
    np.testing.assert_array_equal(weight.dequantize().double().numpy(), expected)


def test_groups_in_order_are_none_whatever_desc_act_says():
    tensors = checkpoint()
    mixed = tensors[f"{NAME}.g_idx"]
    assert torch.equal(read_format(config(), SOURCE).group_of(NAME, IN, stored(tensors)), mixed)
    tensors[f"{NAME}.g_idx"] = mixed.sort().values
    found = read_format(config(desc_act=True), SOURCE)
    assert found.group_of(NAME, IN, stored(tensors)) is None
    assert found.read(NAME, (OUT, IN), stored(tensors)).group_of is None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_of_0_borrows_in_version_1(bits):
    """As GPTQModel writes it; a zero at the end of the range takes nothing from its neighbours."""
    lowest = -(1 << (bits - 1))
    zeros = torch.full((8, 1), lowest, dtype=torch.int16)
    zeros[3], zeros[5] = -1 - lowest, 0
    weight = QuantizedWeight(
        Scheme("int", bits, (1, ALL), False), torch.zeros(8, 8, dtype=torch.int8), scales(8, 1), zeros
    )
    version_2 = make_format("gptq", weight.scheme)
    tensors = version_2.write(NAME, weight, torch.float16)
    assert version_2.config()["checkpoint_format"] == "gptq_v2"
    tensors[f"{NAME}.qzeros"] -= 0x11111111 if bits == 4 else 0x01010101
    version_1 = read_format(config(bits=bits, group_size=-1), SOURCE)
    assert torch.equal(version_1.read(NAME, (8, 8), stored(tensors)).zeros, zeros)


def test_symmetric_weights_are_written_for_every_reader():
    scheme = Scheme("int", 4, (1, 8))
    found = make_format("gptq", scheme)
    weight = QuantizedWeight(scheme, torch.zeros(8, 16, dtype=torch.int8), scales(8, 2))
    tensors = found.write(NAME, weight, torch.bfloat16)
    assert found.config()["checkpoint_format"] == "gptq"
    assert [hex(word) for word in tensors[f"{NAME}.qzeros"].flatten()] == ["0x77777777"] * 2
    assert tensors[f"{NAME}.scales"].dtype == torch.float16
    assert tensors[f"{NAME}.g_idx"].tolist() == [0] * 8 + [1] * 8


def test_layers_with_the_same_groups_are_saved_in_one_file(tmp_path):
    scheme, groups = Scheme("int", 4, (1, 8)), torch.tensor([1, 0] * 8, dtype=torch.int32)
    weight = QuantizedWeight(scheme, torch.zeros(8, 16, dtype=torch.int8), scales(8, 2), group_of=groups)
    found = make_format("gptq", scheme, act_order=True)
    tensors = found.write("q_proj", weight, torch.float16) | found.write("k_proj", weight, torch.float16)
    save_file(tensors, tmp_path / "file")  # refuses tensors that share their memory
    assert torch.equal(load_file(tmp_path / "file")["k_proj.g_idx"], groups)


def test_layers_may_differ_and_may_be_left_out():
    found = read_format(
        config(
            dynamic={
                r"-:.*\.0\..*k_proj": {},
                r"+:.*\.1\.mlp\.down_proj$": {"bits": 8, "group_size": -1},
                r".*\.2\..*": {"sym": True},
            },
            lm_head=True,
        ),
        SOURCE,
    )
    ours = Scheme("int", 4, (1, GROUP), False)
    assert found.scheme_of("model.layers.0.self_attn.q_proj") == ours
    assert found.scheme_of("model.layers.0.self_attn.k_proj") is None
    assert found.scheme_of("model.layers.1.mlp.down_proj") == Scheme("int", 8, (1, ALL), False)
    assert found.scheme_of("model.layers.2.mlp.down_proj") == Scheme("int", 4, (1, GROUP))
    assert found.scheme_of("lm_head") == ours
    assert read_format(found.config(), SOURCE) == found


def test_only_the_layers_named_are_quantized():
    found = read_format(
        config(modules_in_block_to_quantize=[["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]]), SOURCE
    )
    assert found.scheme_of("model.layers.7.mlp.up_proj") is not None
    assert found.scheme_of("model.layers.7.mlp.gate_proj") is None
    assert found.scheme_of("lm_head") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, r"bits 3 .* supported: 4, 8"),
        ({"bits": None}, "bits None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"is_marlin_format": True}, "Marlin"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "64"}, "group_size '64'"),
        ({"dynamic": {"+:.*down_proj": {"bits": 2}}}, "bits 2"),
    ],
)
def test_other_layouts_are_refused(values, message):
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        read_format(config(**values), SOURCE)


def test_zeros_that_the_config_denies_are_not_dropped():
    with pytest.raises(UserError, match=r"q_proj\.qzeros has zeros"):
        read_format(config(sym=True), SOURCE).read(NAME, (OUT, IN), stored(checkpoint()))


@pytest.mark.parametrize("group", [-1, IN // GROUP])
def test_an_input_of_no_group_is_damage(group):
    tensors = checkpoint()
    tensors[f"{NAME}.g_idx"][5] = group
    with pytest.raises(UserError, match=f"g_idx names group {group} of 3"):
        read_format(config(), SOURCE).read(NAME, (OUT, IN), stored(tensors))
