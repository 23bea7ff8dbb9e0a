"""Rows rounded to 8 bits, as they are or as a norm or a gated activation makes them (kernels/rounding.cu)."""

import torch
from torch import Tensor

from engine.ops import reference
from engine.ops.activations import RoundedRows
from engine.ops.compiler import Build
from engine.ops.cuda import rows
from engine.ops.cuda.kernels import check_rows, define_build, kernel

MOST_NUMBERS = 32_768  # of a row that is rounded whole


def rounding_build(arch: str, dtype: torch.dtype, stored: torch.dtype) -> Build:
    return define_build(arch, "rounding.cu", scalar=dtype, stored=stored)


def round_rows(x: Tensor, stored: torch.dtype) -> RoundedRows:
    """x [rows, dim] as int8 or e4m3."""
    if not _is_known(x, x.shape[1]):
        return reference.round_inputs(x, stored)
    y, dim = _new_rows(x, x.shape[1], stored), x.shape[1]
    if x.numel():
        run = kernel(x, "round_rows", rounding_build, x.dtype, stored)
        run((len(x), 1, 1), _threads(dim), y.numbers.data_ptr(), y.scales.data_ptr(), x.data_ptr(), dim)
    return y


def add_rms_norm_rounded(x: Tensor, residual: Tensor, weight: Tensor, eps: float, stored: torch.dtype) -> RoundedRows:
    if not _is_known(x, x.shape[1]):
        return round_rows(rows.add_rms_norm(x, residual, weight, eps), stored)
    y, dim = _new_rows(x, x.shape[1], stored), x.shape[1]
    check_rows(x, residual)
    if x.numel():
        run = kernel(x, "add_rms_norm_rounded" + rows.weight_suffix(weight, x), rounding_build, x.dtype, stored)
        pointers = (y.numbers.data_ptr(), y.scales.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr())
        run((len(x), 1, 1), rows.norm_threads(x), *pointers, dim, eps)
    return y


def gated_activation_rounded(gate_up: Tensor, kind: str, stored: torch.dtype) -> RoundedRows:
    """gated_activation, rounded."""
    dim = gate_up.shape[1] // 2
    if not _is_known(gate_up, dim):
        return round_rows(rows.gated_activation(gate_up, kind), stored)
    y = _new_rows(gate_up, dim, stored)
    if gate_up.numel():
        name = {"silu": "gated_silu_rounded", "gelu_tanh": "gated_gelu_tanh_rounded"}[kind]
        run = kernel(gate_up, name, rounding_build, gate_up.dtype, stored)
        pointers = y.numbers.data_ptr(), y.scales.data_ptr(), gate_up.data_ptr()
        run((len(gate_up), 1, 1), _threads(dim), *pointers, dim)
    return y


def round_panels(x: Tensor) -> RoundedRows:
    """x [rows, dim] as e4m3, each panel of 128 numbers by a scale of its own: scales [panels, rows], rows up to a
    multiple of 128."""
    num_rows, dim = x.shape
    panels, stride, threads = -(-dim // 128), -(-num_rows // 128) * 128, 256
    check_rows(x)
    numbers = x.new_empty(num_rows, dim, dtype=torch.float8_e4m3fn)
    y = RoundedRows(numbers, x.new_empty(panels, stride, dtype=torch.float32), x.dtype)
    if x.numel():
        grid = (num_rows, -(-dim // (8 * threads)), 1)
        run = kernel(x, "round_panels", rounding_build, x.dtype, numbers.dtype)
        run(grid, threads, numbers.data_ptr(), y.scales.data_ptr(), x.data_ptr(), dim, stride)
    return y


def _is_known(x: Tensor, dim: int) -> bool:
    """Whether the kernels round rows of so many numbers of x's type."""
    return x.dtype is not torch.float32 and dim % 8 == 0 and dim <= MOST_NUMBERS


def _new_rows(x: Tensor, dim: int, stored: torch.dtype) -> RoundedRows:
    check_rows(x)
    scales = x.new_empty(len(x), dtype=torch.float32)
    return RoundedRows(x.new_empty(len(x), dim, dtype=stored), scales, x.dtype)


def _threads(dim: int) -> int:
    """Of a row: one for 16 bytes up to 4 KiB, then each up to four times as much."""
    vecs = dim // 8
    return -(-max(-(-vecs // 4), min(vecs, 256)) // 32) * 32
