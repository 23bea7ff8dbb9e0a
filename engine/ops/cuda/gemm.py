"""Matrix products."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer

FEW_ROWS = (8, 16)  # builds of gemm/few_rows.cu, by the most rows they take
FEW_ROWS_OCTETS = (2, 4, 6, 8)  # its kernels, by the eights of outputs in a tile


_is_batch_invariant = False


def use_batch_invariant(is_on: bool) -> None:
    """Whether each row's results come from the same sums in the same order, however many rows there are."""
    global _is_batch_invariant
    _is_batch_invariant = is_on


def builds(arch: str, dtype: torch.dtype) -> Iterator[Build]:
    if dtype is not torch.float32:
        for rows in FEW_ROWS:
            yield few_rows_build(arch, dtype, rows)


def few_rows_build(arch: str, dtype: torch.dtype, rows: int) -> Build:
    ring_bytes = few_rows_ring_bytes(arch)
    return define_build(arch, "gemm/few_rows.cu", ring_bytes, scalar=dtype, rows=rows, ring_bytes=ring_bytes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    octets = _octets(x, weight)
    return _few_rows(octets, x, weight, bias, x.dtype) if octets else F.linear(x, weight, bias)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    octets = _octets(hidden, weight)
    if octets:
        return _few_rows(octets, hidden, weight, None, torch.float32)
    if hidden.dtype is torch.float32:
        return torch.mm(hidden, weight.t())
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


def few_rows_octets(num_rows: int, inputs: int, out: int, num_sms: int, ring_bytes: int) -> int:
    """Eights of outputs in a tile of gemm/few_rows.cu; 0 where cuBLAS is to be called.

    A multiprocessor reads the weights and x for each of its tiles: that is to be little. Two steps must fit the ring.
    Measured on an H200, in us, 28 layers of Qwen3 0.6B and 8 of Llama 3.1 8B without attention: 1 row 491 and 892 (with
    cuBLAS 991 and 1,033), 8 rows 543 and 918 (834 and 1,051), 16 rows and the logits 686 and 1,206 (942 and 1,314).
    """
    if not 0 < num_rows <= FEW_ROWS[-1] or inputs % 8 or out % 8:
        return 0
    halves = -(-num_rows // 8)
    sizes = [octets for octets in FEW_ROWS_OCTETS if 2 * (octets + halves) * 8192 <= ring_bytes]
    return min(sizes, key=lambda octets: -(-out // (8 * octets * num_sms)) * (8 * octets + num_rows))


def few_rows_ring_bytes(arch: str) -> int:
    """Shared memory of a block of gemm/few_rows.cu for copies in flight: all that there is on large GPUs."""
    return {"sm_80": 120 << 10, "sm_90a": 184 << 10, "sm_100a": 184 << 10}.get(arch, 64 << 10)


def _octets(x: Tensor, weight: Tensor) -> int:
    if x.dtype is torch.float32:
        return 0
    device = x.get_device()
    return few_rows_octets(
        len(x), x.shape[1], len(weight), kernels.num_sms(device), few_rows_ring_bytes(kernels.arch(device))
    )


def _few_rows(octets: int, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Reading the weight starts while the kernel launched last may still run: that one must not be what writes it."""
    (num_rows, inputs), out = x.shape, len(weight)
    y = x.new_empty(num_rows, out, dtype=dtype)
    check_rows(x, weight)
    rows = next(n for n in FEW_ROWS if num_rows <= n)
    kernel(x, f"few_rows_{octets}", few_rows_build, x.dtype, rows)(
        (min(kernels.num_sms(x.get_device()), -(-out // (8 * octets))), 1, 1),
        256,
        *(y.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias)),
        *(dtype is torch.float32, num_rows, inputs, out),
    )
    return y
