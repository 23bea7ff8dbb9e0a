"""Products of inputs and weights rounded to 8 bits, e4m3 or int8: a scale for each row of x and each output.

gemm/few_rows_rounded.cu for up to 16 rows, gemm/many_rows_rounded.cu on Hopper for those of larger decode batches, and
for int8 whatever the number; beyond, and elsewhere, what PyTorch calls.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.ops import launcher, reference
from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.gemm import (
    FEW_ROWS,
    FORMS,
    GATED_FORMS,
    MANY_ROWS,
    MANY_ROWS_SHARED_BYTES,
    Tiling,
    few_rows_octets,
    few_rows_ring_bytes,
    is_batch_invariant,
    many_rows_tiling,
)
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer
from engine.ops.cuda.rows import gated_activation

E4M3 = torch.float8_e4m3fn
MOST_ROWS = 128  # of e4m3 for gemm/many_rows_rounded.cu


def builds(arch: str, dtype: torch.dtype, stored: torch.dtype) -> Iterator[Build]:
    """The builds for weights of this type in a model of dtype."""
    yield rounding_build(arch, dtype, stored)
    for rows in FEW_ROWS:
        yield few_rows_build(arch, dtype, stored, rows)
    if arch == "sm_90a":
        for rows in MANY_ROWS:
            yield many_rows_build(arch, dtype, stored, rows)


def rounding_build(arch: str, dtype: torch.dtype, stored: torch.dtype) -> Build:
    return define_build(arch, "rounding.cu", scalar=dtype, stored=stored)


def few_rows_build(arch: str, dtype: torch.dtype, stored: torch.dtype, rows: int) -> Build:
    file, ring_bytes = "gemm/few_rows_rounded.cu", few_rows_ring_bytes(arch)
    return define_build(arch, file, ring_bytes, scalar=dtype, stored=stored, rows=rows, ring_bytes=ring_bytes)


def many_rows_build(arch: str, dtype: torch.dtype, stored: torch.dtype, rows: int) -> Build:
    file, block_bytes = "gemm/many_rows_rounded.cu", MANY_ROWS_SHARED_BYTES
    return define_build(arch, file, block_bytes, scalar=dtype, stored=stored, rows=rows, block_bytes=block_bytes)


def product(x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """(x̂ · numbersᵀ) · x_scale · scales + bias in one of FORMS but "float", x̂ being x rounded row by row."""
    (num_rows, inputs), out, arch = x.shape, len(numbers), kernels.arch(x.get_device())
    is_aligned = inputs % 16 == 0 and out % (16 if form in GATED_FORMS else 8) == 0  # 16 bytes move at a time
    if num_rows and is_aligned and inputs <= 32768 and x.dtype is not torch.float32:
        num_sms, ring_bytes = kernels.num_sms(x.get_device()), few_rows_ring_bytes(arch)
        octets = 0 if is_batch_invariant() else few_rows_octets(num_rows, inputs, out, num_sms, ring_bytes)
        on_hopper = arch == "sm_90a" and (num_rows <= MOST_ROWS or numbers.dtype is torch.int8 or is_batch_invariant())
        rounded, x_scales = round_rows(x, numbers.dtype)
        if octets:
            return few_rows(octets, rounded, x_scales, numbers, scales, bias, form, x.dtype)
        if on_hopper:
            tiling = many_rows_tiling(num_rows, out, form, num_sms)
            return many_rows(tiling, rounded, x_scales, numbers, scales, bias, form, x.dtype)
        if numbers.dtype is E4M3 and torch.cuda.get_device_capability(x.device) >= (8, 9) and out % 16 == 0:
            y = _scaled_product(rounded, x_scales, numbers, scales, bias).to(x.dtype)
            return gated_activation(y, form) if form in GATED_FORMS else y
    y = reference.rounded_linear(x, numbers, scales, bias)
    return gated_activation(y, form) if form in GATED_FORMS else y


def round_rows(x: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x [rows, dim] as int8 or e4m3, the scales of its rows [rows] float32)."""
    num_rows, dim = x.shape
    check_rows(x)
    y, scales = torch.empty_like(x, dtype=stored), x.new_empty(num_rows, dtype=torch.float32)
    threads = min(1024, -(-dim // 256) * 32)  # one for 16 bytes, or each up to four times as much
    assert dim <= 4 * 8 * threads, f"rows of {dim} numbers are too long to be rounded"
    kernel(x, "round_rows", rounding_build, x.dtype, stored)(
        (num_rows, 1, 1), threads, y.data_ptr(), scales.data_ptr(), x.data_ptr(), dim
    )
    return y, scales


# Both kernels read the weight while the one launched last may still run: that one must not be what writes it.


def few_rows(
    octets: int,
    x: Tensor,
    x_scales: Tensor,
    numbers: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    form: str,
    dtype: torch.dtype,
) -> Tensor:
    """x [rows, in] and numbers [out, in] of 8 bits, their scales, result in dtype."""
    (num_rows, inputs), out = x.shape, len(numbers)
    y = _new_result(x, numbers, form, dtype)
    rows = next(n for n in FEW_ROWS if num_rows <= n)
    kernel(x, f"few_rows_rounded_{octets}", few_rows_build, dtype, x.dtype, rows)(
        (min(kernels.num_sms(x.get_device()), -(-out // (8 * octets))), 1, 1),
        256,
        *(y.data_ptr(), x.data_ptr(), numbers.data_ptr(), pointer(bias), x_scales.data_ptr(), scales.data_ptr()),
        *(FORMS.index(form), num_rows, inputs, out),
    )
    return y


def many_rows(
    tiling: Tiling,
    x: Tensor,
    x_scales: Tensor,
    numbers: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    form: str,
    dtype: torch.dtype,
) -> Tensor:
    """As few_rows."""
    (num_rows, inputs), out = x.shape, len(numbers)
    y = _new_result(x, numbers, form, dtype)
    words = inputs // 2
    kernel(x, f"many_rows_rounded_{tiling.groups}x{tiling.parts}", many_rows_build, dtype, x.dtype, tiling.rows)(
        (tiling.blocks(num_rows, out, kernels.num_sms(x.get_device())), 1, 1),
        128 * (tiling.groups + 1),
        launcher.tensor_map(numbers.data_ptr(), out, words, tiling.height // tiling.cluster),
        launcher.tensor_map(x.data_ptr(), num_rows, words, tiling.rows),
        *(y.data_ptr(), pointer(bias), x_scales.data_ptr(), scales.data_ptr()),
        *(FORMS.index(form), num_rows, words, y.shape[1], tiling.height, tiling.split),
        cluster=max(tiling.cluster, tiling.split),
    )
    return y


def _scaled_product(x: Tensor, x_scales: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """In bfloat16, the one type that PyTorch's product with scales for rows and outputs gives."""
    y = torch._scaled_mm(
        x, numbers.t(), x_scales.unsqueeze(1), scales.unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y if bias is None else y + bias


def _new_result(x: Tensor, numbers: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    check_rows(x, numbers)
    out = len(numbers) // 2 if form in GATED_FORMS else len(numbers)
    return x.new_empty(len(x), out, dtype=torch.float32 if form == "float" else dtype)
