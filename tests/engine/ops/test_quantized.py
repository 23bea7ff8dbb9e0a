"""Products with weights of few bits equal, in float64, those of the numbers that the weights stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import ops
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.layers.weights import FilledWeight, Part, empty_weight
from engine.ops import RoundedRows, native, reference
from engine.parallel.groups import Group
from engine.quantization.weight import ALL, E4M3, QuantizedWeight, Scheme, round_to_nearest

DTYPES = [torch.float32, torch.bfloat16]
SCHEMES = {
    "int4": Scheme("int", 4, (1, 32)),
    "int4, zeros": Scheme("int", 4, (1, 16), is_symmetric=False),
    "int4, squares": Scheme("int", 4, (8, 8)),
    "int8": Scheme("int", 8, (1, 32)),
    "int8, a scale an output, zeros": Scheme("int", 8, (1, ALL), is_symmetric=False),
    "fp8": Scheme("float", 8, (1, ALL)),
    "fp8, one scale": Scheme("float", 8, (ALL, ALL)),
    "int8 by int8": Scheme("int", 8, (1, ALL), rounds_inputs=True),
    "fp8 by fp8": Scheme("float", 8, (1, ALL), rounds_inputs=True),
    "fp8 by fp8, one scale": Scheme("float", 8, (ALL, ALL), rounds_inputs=True),
    "fp8 by fp8, blocks": Scheme("float", 8, (16, 32), rounds_inputs=True),
    "fp8 by fp8, blocks that stick out": Scheme("float", 8, (24, 40), rounds_inputs=True),
}


@pytest.fixture(params=["native", "reference", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request, monkeypatch) -> str:
    """Of the body that is tested."""
    if request.param == "reference":
        monkeypatch.setattr(native, "is_usable", lambda x: False)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.mark.parametrize("tile_numbers", [reference.TILE_NUMBERS, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SCHEMES)
def test_a_product_is_exact_to_rounding(case, dtype, tile_numbers, device, monkeypatch):
    monkeypatch.setattr(reference, "TILE_NUMBERS", tile_numbers)
    scheme, generator = SCHEMES[case], torch.Generator().manual_seed(len(case))
    for rows, in_features, out_features in ((1, 96, 48), (3, 64, 80), (40, 160, 16)):
        weight = round_to_nearest(torch.randn(out_features, in_features, generator=generator), scheme)
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        bias = torch.randn(out_features, generator=generator).to(dtype) if rows > 1 else None
        exact = as_rounded(x, scheme) @ exact_weight(weight, dtype).t() + (0 if bias is None else bias.double())
        held = hold(weight, dtype, device)
        y = held.apply(x.to(device), None if bias is None else bias.to(device)).cpu()
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * exact.std().item())
        gated = held.apply_gated(x.to(device), None if bias is None else bias.to(device), "silu").cpu()
        # Not that of y: to round a large negative gate, as a kernel of both does not, changes what is left of it.
        exact, tolerance = ops.gated_activation(exact, "silu"), 2 * tolerance  # a product of two such numbers
        torch.testing.assert_close(gated.double(), exact, rtol=tolerance, atol=tolerance * exact.std().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["int8", "fp8", "int8 by int8", "fp8 by fp8", "fp8 by fp8, blocks"])
def test_inputs_made_for_a_weight_change_no_bit_of_a_layer(case, dtype, device):
    """Norm, gate and up, activation, down: each made as the next one takes it, or as plain numbers."""
    scheme, generator = SCHEMES[case], torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, 5, 96, generator=generator).to(device, dtype)
    norm = RMSNorm("norm", 96, 1e-5, Placement(dtype, torch.device(device), Group()))
    norm.weight.copy_(torch.rand(96, generator=generator))
    gate_up, down = (
        hold(round_to_nearest(torch.randn(shape, generator=generator), scheme), dtype, device)
        for shape in ((256, 96), (96, 128))
    )
    added = residual.clone()
    inputs = gate_up.inputs_of(norm, x, added)
    y = down.apply(gate_up.apply_gated(inputs, None, "silu", down.rounds_to), None)
    assert isinstance(inputs, RoundedRows) == (case in ("int8 by int8", "fp8 by fp8"))
    assert torch.equal(y, down.apply(gate_up.apply_gated(norm.add(x, residual), None, "silu"), None))
    assert torch.equal(added, residual)


def hold(weight: QuantizedWeight, dtype: torch.dtype, device: str) -> FilledWeight:
    rows, in_features = weight.numbers.shape
    placement = Placement(dtype, torch.device(device), Group())
    held, _ = empty_weight([Part("a weight", rows, weight.scheme)], in_features, placement)
    assert isinstance(held, FilledWeight)
    held.put(0, weight)
    return held


def as_rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """In float64, each row and block of columns to the nearest; scales and steps are float32, as they are stored."""
    if not scheme.rounds_inputs:
        return x.double()
    block = scheme.block[1] or x.shape[1]
    parts = []
    for part in x.float().split(block, 1):
        largest = 127.0 if scheme.kind == "int" else 448.0
        scale = part.abs().amax(1, keepdim=True) / largest
        steps = part / scale
        parts.append((steps.round() if scheme.kind == "int" else steps.to(E4M3)).double() * scale.double())
    return torch.cat(parts, 1)


def exact_weight(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Integers that are multiplied with inputs as they are become numbers of the inputs' type first."""
    exact = weight.dequantize()
    is_converted = weight.scheme.kind == "int" and not weight.scheme.rounds_inputs
    return (exact.to(dtype) if is_converted else exact).double()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 6, 32]),
    groups=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    has_zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_parts_come_out_of_a_grouped_weight_as_they_were_put_in(bits, group_size, groups, sizes, has_zeros, seed):
    """Bit for bit, the extremes too: the product with each input alone is its column."""
    generator, limit = torch.Generator().manual_seed(seed), 1 << bits - 1
    in_features = group_size * groups
    weight = ops.empty_grouped(sum(sizes), in_features, bits, group_size, has_zeros, torch.empty)
    first, columns = 0, []
    for rows in sizes:
        numbers = torch.randint(-limit, limit, (rows, in_features), dtype=torch.int8, generator=generator)
        scales = torch.randint(1, 9, (rows, groups), generator=generator) / 8
        zeros = torch.randint(-limit, limit + 1, (rows, groups), dtype=torch.int16, generator=generator)
        ops.put_grouped(weight, first, numbers, scales, zeros if has_zeros else None)
        each = (numbers.float() - zeros.repeat_interleave(group_size, 1) * has_zeros) * scales.repeat_interleave(
            group_size, 1
        )
        columns.append(each)
        first += rows
    assert torch.equal(ops.grouped_linear(torch.eye(in_features), weight, None).t(), torch.cat(columns))


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_a_row_of_zeros_is_rounded_to_zeros(dtype):
    weight = torch.ones(4, 8).to(dtype)
    y = ops.rounded_linear(torch.zeros(2, 8), weight, torch.ones(4), None)
    assert torch.equal(y, torch.zeros(2, 4))


@pytest.mark.skipif(not native.is_usable(torch.empty(0)), reason="this machine has no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded_to", [torch.int8, E4M3])
def test_native_rounding_is_the_references_to_the_last_bit(rounded_to, dtype):
    """Of large and small numbers, and of those in the middle between two."""
    generator = torch.Generator().manual_seed(5)
    sizes = 2.0 ** torch.randint(-14, 4, (60, 129), generator=generator)
    x = (torch.randn(60, 129, generator=generator) * sizes).to(dtype)
    halves = torch.arange(-254, 255).to(dtype) / 2  # scale 1
    fine = torch.arange(-448, 449).to(dtype)
    small = torch.cat([torch.arange(-40, 41) * 2.0**-10, torch.tensor([448.0])]).to(dtype)
    for values in (x, halves[None], fine[None], small[None], torch.zeros(1, 5, dtype=dtype)):
        expected, scales = reference.round_rows(values.float(), rounded_to)
        found, found_scales = native._round_rows(values, rounded_to)
        assert torch.equal(found.float(), expected.float())
        assert torch.equal(found_scales, scales.squeeze(1))


def test_every_e4m3_number_is_worked_out_exactly():
    """By tiles, and for few rows: 448 times any of them is a bfloat16 too."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    numbers = codes.view(E4M3)
    found = ops.blockwise_linear(torch.ones(1, 1), numbers.unsqueeze(1), torch.ones(1, 1), (256, 1), False, None)
    assert torch.equal(found[0], numbers.float())
    weight, x = torch.zeros(254, 32, dtype=torch.uint8), torch.zeros(3, 32, dtype=torch.bfloat16)
    weight[:, 5], x[:, 5] = codes, 448.0
    found = ops.rounded_linear(x, weight.view(E4M3), torch.ones(254), None)
    assert torch.equal(found.float() / 448, numbers.float().expand(3, -1))


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("in_features", "group_size"), [(576, 64), (128, 32), (192, ALL)])
def test_few_rows_say_the_same_alone_and_together(in_features, group_size, is_symmetric):
    """Groups of 64 lie across the middle of a row of 576, where the packed halves meet."""
    generator = torch.Generator().manual_seed(in_features)
    scheme = Scheme("int", 4, (1, group_size), is_symmetric)
    weight = round_to_nearest(torch.randn(37, in_features, generator=generator) + 0.5, scheme)
    held = hold(weight, torch.bfloat16, "cpu")
    x, bias = torch.randn(70, in_features, generator=generator).bfloat16(), torch.randn(37).bfloat16()
    exact = x.double() @ weight.dequantize().double().t() + bias.double()
    for rows in (1, 3, 4, 9, 64, 70):
        y = held.apply(x[:rows], bias)
        torch.testing.assert_close(y.double(), exact[:rows], rtol=2**-7, atol=2**-7 * exact.std().item())
    alone = torch.cat([held.apply(row[None], bias) for row in x[:7]])
    torch.testing.assert_close(held.apply(x[:7], bias), alone, rtol=2**-7, atol=1e-4)
