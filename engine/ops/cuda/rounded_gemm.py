"""Products of inputs and weights rounded to 8 bits, e4m3 or int8: a scale for each row of x and each output.

gemm/few_rows_rounded.cu for up to 16 rows, gemm/many_rows_rounded.cu on Hopper for those of larger decode batches, and
for int8 whatever the number; beyond, and elsewhere, what PyTorch calls. e4m3 in squares of 128 by 128 takes the same
kernels, whatever the number of rows.

What sums of e4m3 lose, measured on an H200 against float64, as a part of a row's norm: nothing with few rows, 1.3e-4
with many, 1.4e-3 in PyTorch's product (which is exact with `use_fast_accum=False`, but takes 13 % longer at 8,192
rows). The rounding of inputs and weights changes a result by 3e-2 or so, and that to bfloat16 by 1.7e-3.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.ops import launcher, reference
from engine.ops.activations import Activations, RoundedRows
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
    many_rows_tiling,
)
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer
from engine.ops.cuda.rounding import gated_activation_rounded, round_panels, round_rows, rounding_build
from engine.ops.cuda.rows import gated_activation

E4M3 = torch.float8_e4m3fn
MOST_ROWS = 128  # of e4m3 for gemm/many_rows_rounded.cu, whatever the product


def builds(arch: str, dtype: torch.dtype, stored: torch.dtype, has_panels: bool = False) -> Iterator[Build]:
    """The builds for weights of this type in a model of dtype. has_panels: they are in squares of 128 by 128."""
    yield rounding_build(arch, dtype, stored)
    for rows in FEW_ROWS:
        yield few_rows_build(arch, dtype, stored, rows, has_panels)
    if arch == "sm_90a":
        for rows in MANY_ROWS:
            yield many_rows_build(arch, dtype, stored, rows, has_panels)


def few_rows_build(arch: str, dtype: torch.dtype, stored: torch.dtype, rows: int, has_panels: bool) -> Build:
    file, size = "gemm/few_rows_rounded.cu", few_rows_ring_bytes(arch)
    has = int(has_panels)
    return define_build(arch, file, size, scalar=dtype, stored=stored, rows=rows, ring_bytes=size, has_panels=has)


def many_rows_build(arch: str, dtype: torch.dtype, stored: torch.dtype, rows: int, has_panels: bool) -> Build:
    file, size = "gemm/many_rows_rounded.cu", MANY_ROWS_SHARED_BYTES
    has = int(has_panels)
    return define_build(arch, file, size, scalar=dtype, stored=stored, rows=rows, block_bytes=size, has_panels=has)


def product(
    x: Activations,
    numbers: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    form: str,
    rounds_to: torch.dtype | None = None,
) -> Activations:
    """(x̂ · numbersᵀ) · x_scale · scales + bias in one of FORMS but "float", x̂ being x rounded row by row.

    rounds_to: what the result is rounded to then, if to anything.
    """
    rounded = x if isinstance(x, RoundedRows) else round_rows(x, numbers.dtype)
    y = _product(rounded, numbers, scales, bias, form)
    if y is not None:
        return y if rounds_to is None else round_rows(y, rounds_to)
    y = _large_product(rounded, numbers, scales, bias)
    if form not in GATED_FORMS:
        return y if rounds_to is None else round_rows(y, rounds_to)
    return gated_activation(y, form) if rounds_to is None else gated_activation_rounded(y, form, rounds_to)


def panel_product(x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor | None:
    """x̂ · Wᵀ + bias: W is e4m3 with scales for squares [blocks of out, blocks of in], x̂ is x rounded by panels.

    None where no kernel is for it.
    """
    if x.dtype is torch.float32 or x.shape[1] % 16:
        return None
    return _product(round_panels(x), numbers, scales, bias, "plain")


def _product(x: RoundedRows, numbers: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor | None:
    """By our kernels, where they are for it."""
    (num_rows, inputs), out, device = x.numbers.shape, len(numbers), numbers.get_device()
    is_aligned = inputs % 16 == 0 and out % (16 if form in GATED_FORMS else 8) == 0  # 16 bytes move at a time
    if not num_rows or not is_aligned or x.dtype is torch.float32:
        return None
    arch, num_sms = kernels.arch(device), kernels.num_sms(device)
    on_hopper = arch == "sm_90a"
    if not on_hopper or out <= 64 * num_sms:  # beyond, a multiprocessor would have several tiles of few rows
        octets = few_rows_octets(num_rows, inputs, out, num_sms, few_rows_ring_bytes(arch))
        if octets:
            return few_rows(octets, x, numbers, scales, bias, form)
    takes_all = numbers.dtype is torch.int8 or _has_panels(x)
    if on_hopper and (takes_all or many_rows_pays(num_rows, out, form, num_sms)):
        return many_rows(rounded_tiling(num_rows, inputs, out, form, num_sms), x, numbers, scales, bias, form)
    return None


def many_rows_pays(num_rows: int, out: int, form: str, num_sms: int) -> bool:
    """Whether gemm/many_rows_rounded.cu is faster than PyTorch's product of e4m3, and the activation, which it saves.

    Measured on an H200, in us, weights rotating in a graph; PyTorch's in brackets, without the activation.

    | inputs, out (of Llama 3.1 8B) | 32 rows | 64 | 128 | 256 |
    |---|---|---|---|---|
    | 4096, 28672 gated | 31.0 (35.9) | 33.3 (36.4) | 38.9 (35.2) | 61.9 (50.3) |
    | 14336, 4096 | 18.5 (36.9) | 20.3 (36.5) | 25.1 (36.7) | 32.0 (36.9) |
    | 4096, 6144 | 9.8 (13.7) | 10.8 (13.8) | 12.6 (13.8) | 18.0 (14.2) |
    | 4096, 4096 | 8.1 (13.2) | 9.5 (13.2) | 10.7 (13.3) | 12.5 (13.5) |
    """
    if num_rows <= MOST_ROWS:
        return True
    return form not in GATED_FORMS and -(-num_rows // 64) * -(-out // 128) <= num_sms


def rounded_tiling(num_rows: int, inputs: int, out: int, form: str, num_sms: int) -> Tiling:
    """Tiles of 64 outputs a warpgroup, the smallest of which there are no more than multiprocessors. If these are two
    for each or more, blocks share out the inputs, 4,096 or more each. What is gated, or large, is tiled as in 16 bits.
    """
    rows = next((n for n in MANY_ROWS if num_rows <= n), MANY_ROWS[-1])

    def num_tiles(tiling: Tiling) -> int:
        return -(-num_rows // tiling.rows) * -(-out // tiling.height)

    low = min(rows, 64)
    tilings = [Tiling(low, 2, 1, 128), Tiling(low, 1, 1, 64), Tiling(rows, 2, 1, 128)]
    fitting = [tiling for tiling in tilings if num_sms // 3 <= num_tiles(tiling) <= num_sms]
    if form in GATED_FORMS or not fitting:
        return many_rows_tiling(num_rows, out, form, num_sms)
    best = max(fitting, key=num_tiles)
    split = 2 if 2 * num_tiles(best) <= num_sms and inputs >= 2 * 4096 else 1
    return replace(best, split=split)


def _large_product(x: RoundedRows, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """By what PyTorch calls, whose product with scales gives bfloat16: not for those who want float32."""
    can_scale = torch.cuda.get_device_capability(numbers.device) >= (8, 9) and not any(n % 16 for n in numbers.shape)
    if numbers.dtype is E4M3 and len(x.numbers) and can_scale and x.dtype is not torch.float32:
        return _scaled_product(x, numbers, scales, bias).to(x.dtype)
    return reference.rounded_linear(x, numbers, scales, bias)


# Both kernels read the weight while the one launched last may still run: that one must not be what writes it.


def few_rows(
    octets: int,
    x: RoundedRows,
    numbers: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    form: str,
) -> Tensor:
    """In one of FORMS."""
    (num_rows, inputs), out = x.numbers.shape, len(numbers)
    y = _new_result(x, numbers, form)
    rows = next(n for n in FEW_ROWS if num_rows <= n)
    kernel(numbers, f"few_rows_rounded_{octets}", few_rows_build, x.dtype, numbers.dtype, rows, _has_panels(x))(
        (min(kernels.num_sms(numbers.get_device()), -(-out // (8 * octets))), 1, 1),
        256,
        *(y.data_ptr(), x.numbers.data_ptr(), numbers.data_ptr(), pointer(bias)),
        *(x.scales.data_ptr(), scales.data_ptr()),
        *(FORMS.index(form), num_rows, inputs, out),
    )
    return y


def many_rows(
    tiling: Tiling,
    x: RoundedRows,
    numbers: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    form: str,
) -> Tensor:
    """As few_rows."""
    (num_rows, inputs), out = x.numbers.shape, len(numbers)
    y = _new_result(x, numbers, form)
    words = inputs // 2
    name = f"many_rows_rounded_{tiling.groups}x{tiling.parts}"
    kernel(numbers, name, many_rows_build, x.dtype, numbers.dtype, tiling.rows, _has_panels(x))(
        (tiling.blocks(num_rows, out, kernels.num_sms(numbers.get_device())), 1, 1),
        384,
        launcher.tensor_map(numbers.data_ptr(), out, words, tiling.height // tiling.cluster),
        launcher.tensor_map(x.numbers.data_ptr(), num_rows, words, tiling.rows),
        *(y.data_ptr(), pointer(bias), x.scales.data_ptr(), scales.data_ptr()),
        *(FORMS.index(form), num_rows, words, y.shape[1], *tiling.arguments(num_rows, words, out)),
        cluster=max(tiling.cluster, tiling.split),
    )
    return y


def _scaled_product(x: RoundedRows, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """In bfloat16, the one type that PyTorch's product with scales for rows and outputs gives."""
    y = torch._scaled_mm(
        x.numbers,
        numbers.t(),
        x.scales.unsqueeze(1),
        scales.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y if bias is None else y + bias


def _has_panels(x: RoundedRows) -> bool:
    return x.scales.dim() == 2


def _new_result(x: RoundedRows, numbers: Tensor, form: str) -> Tensor:
    check_rows(x.numbers, numbers)
    out = len(numbers) // 2 if form in GATED_FORMS else len(numbers)
    return numbers.new_empty(len(x.numbers), out, dtype=torch.float32 if form == "float" else x.dtype)
