"""The format awq, number by number."""

from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from engine.quantization.formats import read_format
from engine.quantization.weight import ALL, Scheme
from tests.engine.quantization.formats.stored import SOURCE, digit, scales, stored, words

NAME = "model.layers.0.self_attn.q_proj"
OUT, IN, GROUP = 24, 32, 16


def config(**values: Any) -> dict[str, Any]:
    given = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return given | values


def test_a_weight_is_what_its_formula_says():
    tensors = {
        f"{NAME}.qweight": words(IN, OUT // 8),
        f"{NAME}.qzeros": words(IN // GROUP, OUT // 8, seed=1),
        f"{NAME}.scales": scales(IN // GROUP, OUT),
    }
    qweight, qzeros, scale = (tensor.numpy() for tensor in tensors.values())
    expected = np.empty((OUT, IN))
    for c in range(OUT // 8):
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            o = 8 * c + output
            for i in range(IN):
                q, zero = digit(qweight[i, c], place, 4), digit(qzeros[i // GROUP, c], place, 4)
                expected[o, i] = float(scale[i // GROUP, o]) * (q - zero)
    weight = read_format(config(), SOURCE).read(NAME, (OUT, IN), stored(tensors))
    np.testing.assert_array_equal(weight.dequantize().double().numpy(), expected)


def test_layers_may_be_left_out_by_a_part_of_their_names():
    found = read_format(config(modules_to_not_convert=["self_attn.k_proj", "layers.1"], group_size=-1), SOURCE)
    assert found.scheme_of("model.layers.0.self_attn.k_proj") is None
    assert found.scheme_of("model.layers.1.self_attn.q_proj") is None
    assert found.scheme_of("model.layers.10.self_attn.q_proj") == Scheme("int", 4, (1, ALL), False)
    assert found.scheme_of("lm_head") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": "gemv"}, "version 'gemv' .* supported: 'gemm'"),
        ({"version": "GEMV_FAST"}, "version 'gemv_fast'"),
        ({"version": None, "format": "marlin"}, "format 'marlin'"),
        ({"bits": 8}, "bits 8 .* supported: 4"),
        ({"zero_point": False}, "zero_point False"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head'"),
    ],
)
def test_other_layouts_are_refused(values, message):
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        read_format(config(**values), SOURCE)
