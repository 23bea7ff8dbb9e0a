"""What a format writes it reads again to the last bit, and what it cannot say it refuses with the way out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.quantization.formats import make_format, read_format
from engine.quantization.weight import ALL, QuantizedWeight, Scheme, round_to_grid, round_to_nearest
from tests.engine.quantization.formats.stored import SOURCE, stored

NAME = "model.layers.3.mlp.down_proj"
INTEGERS = [Scheme("int", bits, (1, g), symmetric) for bits in (4, 8) for g in (16, ALL) for symmetric in (True, False)]
ROUNDED = [
    Scheme("int", 8, (1, ALL), rounds_inputs=True),
    Scheme("int", 8, (1, ALL), False, rounds_inputs=True),
    Scheme("float", 8, (1, ALL), rounds_inputs=True),
    Scheme("float", 8, (ALL, ALL), rounds_inputs=True),
    Scheme("float", 8, (16, 8), rounds_inputs=True),
]
CAN_SAY = [
    *[("compressed-tensors", scheme, False) for scheme in INTEGERS + ROUNDED],
    *[("gptq", scheme, act_order) for scheme in INTEGERS for act_order in (False, True)],
    *[("awq", scheme, False) for scheme in INTEGERS if scheme.bits == 4 and not scheme.is_symmetric],
    ("fp8", ROUNDED[-1], False),
]


def quantized(scheme: Scheme, shape: tuple[int, int], act_order: bool, scale_dtype: torch.dtype, seed: int):
    """A weight as a solver makes it, for a format with scales of this type."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) + (torch.rand(1, generator=generator) - 0.5) * 8
    nearest = round_to_nearest(weight, scheme)
    found = round_to_grid(weight, scheme, nearest.scales.to(scale_dtype), nearest.zeros)
    if not act_order or nearest.scales.shape[1] == 1:
        return found
    mixed = torch.randperm(shape[1], generator=generator) // scheme.block[1]
    return QuantizedWeight(scheme, found.numbers, found.scales, found.zeros, mixed.to(torch.int32))


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.scheme == expected.scheme
    for part in ("numbers", "scales", "zeros", "group_of"):
        a, b = getattr(found, part), getattr(expected, part)
        assert (a is None) == (b is None), part
        if a is not None:
            assert a.dtype == b.dtype, part
            assert a.is_contiguous(), part
            bits = [tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in (a, b)]
            assert torch.equal(*bits), part


@pytest.mark.parametrize(("name", "scheme", "act_order"), CAN_SAY)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_a_weight_comes_back_as_it_was_written(name, scheme, act_order, rows, columns, dtype, seed):
    written = make_format(name, scheme, act_order=act_order)
    shape = (16 * rows, 16 * columns)
    written.check(NAME, shape)
    weight = quantized(scheme, shape, act_order, written.scale_dtype(dtype), seed)
    tensors = written.write(NAME, weight, dtype)
    assert all(tensor.is_contiguous() for tensor in tensors.values())

    found = read_format(written.config(), SOURCE)
    assert_same(found.read(NAME, shape, stored(tensors)), weight)
    groups = found.group_of(NAME, shape[1], stored(tensors))
    assert torch.equal(groups, weight.group_of) if weight.group_of is not None else groups is None


@pytest.mark.parametrize(("name", "scheme", "act_order"), CAN_SAY)
def test_a_config_says_which_layers_stay_as_they_are(name, scheme, act_order):
    ignored = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    written = make_format(name, scheme, act_order=act_order, ignored=ignored)
    for layers in (written, read_format(written.config(), SOURCE)):
        for layer in [*ignored, "lm_head"]:
            assert layers.scheme_of(layer) is None
        for layer in ("model.layers.11.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
            assert layers.scheme_of(layer) == scheme
    assert read_format(written.config(), SOURCE) == written


CANNOT_SAY = [
    ("awq", Scheme("int", 4, (1, 64)), False, "--asym"),
    ("awq", Scheme("int", 8, (1, 64), False), False, "8-bit integers with zeros in groups of 64 inputs"),
    ("awq", Scheme("int", 4, (1, 64), False), True, "--desc-act"),
    ("awq", Scheme("float", 8, (1, ALL), rounds_inputs=True), False, "not e4m3 in rows and rounded inputs"),
    ("gptq", Scheme("int", 8, (1, ALL), rounds_inputs=True), False, "not 8-bit integers in rows and rounded inputs"),
    ("gptq", Scheme("float", 8, (1, ALL), rounds_inputs=True), False, "--format compressed-tensors"),
    ("compressed-tensors", Scheme("int", 4, (1, 64)), True, "--desc-act"),
    ("compressed-tensors", Scheme("int", 4, (1, 64), rounds_inputs=True), False, "not with rounded"),
    ("fp8", Scheme("float", 8, (1, ALL), rounds_inputs=True), False, "--format compressed-tensors"),
    ("fp8", Scheme("int", 4, (1, 64)), False, "not 4-bit integers in groups of 64 inputs"),
    ("ggml", Scheme("int", 4, (1, 64)), False, "compressed-tensors, gptq, awq, fp8"),
]


@pytest.mark.parametrize(("name", "scheme", "act_order", "words"), CANNOT_SAY)
def test_what_a_format_cannot_say_it_refuses(name, scheme, act_order, words):
    with pytest.raises(UserError, match=words):
        make_format(name, scheme, act_order=act_order)


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "words"),
    [
        ("gptq", Scheme("int", 4, (1, 64)), (12, 64), "has 12 outputs.* 8 at a time"),
        ("gptq", Scheme("int", 8, (1, 64)), (6, 64), "has 6 outputs.* 4 at a time"),
        ("gptq", Scheme("int", 4, (1, 128)), (16, 576), "has 576 inputs.* 128 at a time"),
        ("awq", Scheme("int", 4, (1, ALL), False), (16, 12), "has 12 inputs.* 8 at a time"),
        ("awq", Scheme("int", 4, (1, 64), False), (12, 64), "has 12 outputs"),
        ("compressed-tensors", Scheme("int", 4, (1, 128)), (16, 576), "has 576 inputs.*smaller group size"),
        ("fp8", Scheme("float", 8, (128, 128), rounds_inputs=True), (576, 1536), "has 576 outputs.* 128 at a time"),
    ],
)
def test_a_weight_that_does_not_fit_is_told_before_it_is_written(name, scheme, shape, words):
    with pytest.raises(UserError, match=f"^{NAME} {words}"):
        make_format(name, scheme).check(NAME, shape)


@pytest.mark.parametrize("method", ["bitsandbytes", "aqlm", None])
def test_an_unknown_method_is_refused_with_the_known_ones(method):
    with pytest.raises(UserError, match=r"config\.json: .*supported: compressed-tensors, gptq, awq, fp8, fbgemm_fp8"):
        read_format({"quant_method": method}, SOURCE)
