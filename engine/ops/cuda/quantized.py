"""Products with weights of few bits: what the kernels know by them, the rest as plain torch."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from engine.ops import reference
from engine.ops.activations import Activations
from engine.ops.compiler import Build
from engine.ops.cuda import grouped_gemm, grouped_weight, rounded_gemm
from engine.ops.cuda.grouped_weight import PackedWeight
from engine.ops.grouped import GroupedWeight
from engine.quantization.weight import ALL, Scheme

SQUARES = (128, 128)  # the blocks of e4m3 that kernels know


def builds(arch: str, dtype: torch.dtype, schemes: Iterable[Scheme]) -> Iterator[Build]:
    """What weights of these schemes run on."""
    if dtype is torch.float32:
        return
    for scheme in schemes:
        if scheme.kind == "int" and not scheme.rounds_inputs:
            yield from grouped_gemm.builds(arch, dtype, scheme.bits, scheme.block[1])
        elif scheme.rounds_inputs and scheme.block[1] == ALL:
            yield from rounded_gemm.builds(arch, dtype, torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn)
        elif scheme.rounds_inputs and scheme.block == SQUARES:
            yield from rounded_gemm.builds(arch, dtype, torch.float8_e4m3fn, has_panels=True)


def empty_grouped(
    out_features: int, in_features: int, bits: int, group_size: int, has_zeros: bool, empty: Callable[..., Tensor]
) -> GroupedWeight:
    dtype = empty(0).dtype
    if dtype is torch.float32 or not grouped_weight.knows_groups(in_features, group_size):
        return reference.empty_grouped(out_features, in_features, bits, group_size, has_zeros, empty)
    return grouped_weight.empty(out_features, in_features, group_size, bits, dtype, empty)


def put_grouped(weight: GroupedWeight, first_row: int, numbers: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    if isinstance(weight, PackedWeight):
        grouped_weight.put(weight, first_row, numbers, scales, zeros)
    else:
        reference.put_grouped(weight, first_row, numbers, scales, zeros)


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, PackedWeight):
        return grouped_gemm.product(x, weight, bias, "plain")
    return reference.grouped_linear(x, weight, bias)


def grouped_gated_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, kind: str) -> Tensor:
    if isinstance(weight, PackedWeight):
        return grouped_gemm.product(x, weight, bias, kind)
    return reference.grouped_gated_linear(x, weight, bias, kind)


def rounded_linear(x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = rounded_gemm.product(x, numbers, scales, bias, "plain")
    assert isinstance(y, Tensor)
    return y


def rounded_gated_linear(
    x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None
) -> Activations:
    return rounded_gemm.product(x, numbers, scales, bias, kind, rounds_to)


def blockwise_linear(
    x: Tensor, numbers: Tensor, scales: Tensor, block: tuple[int, int], rounds_inputs: bool, bias: Tensor | None
) -> Tensor:
    y = rounded_gemm.panel_product(x, numbers, scales, bias) if rounds_inputs and block == SQUARES else None
    return reference.blockwise_linear(x, numbers, scales, block, rounds_inputs, bias) if y is None else y
