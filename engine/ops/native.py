"""Native CPU bodies of the ops: one call into the library of kernels/cpu each, a few microseconds around the work.

Each knows bfloat16 and float32; what it does not know goes to the reference. Invariant: a pointer handed to the library
is that of a contiguous tensor which a local name keeps alive.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch
from engine.ops import reference
from engine.ops.activations import Activations, RoundedRows
from engine.ops.grouped import GroupedWeight
from engine.ops.native_build import load_library

TYPES = {torch.bfloat16: 0, torch.float32: 1}
NORM_TYPES = {  # of the vectors and of the norm's weight
    (torch.bfloat16, torch.bfloat16): (0, 0),
    (torch.bfloat16, torch.float32): (0, 1),
    (torch.float32, torch.float32): (1, 1),
}
INT4, INT8, FP8 = 0, 1, 2  # kinds of numbers of few bits, as in kernels/cpu/quantized.c
SUM_TYPES = {torch.bfloat16: 0, torch.float32: 1, torch.int32: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
BLOCK_SIZE = 16
_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "rms_norm": [_POINTER] * 4 + [_SIZE] * 2 + [_FLOAT, _INT, _INT],
    "gated_activation": [_POINTER] * 2 + [_SIZE] * 2 + [_INT] * 2,
    "rotate_and_store": [_POINTER] * 9 + [_SIZE] * 6 + [_FLOAT, _INT, _INT],
    "paged_attention": [_POINTER] * 8 + [_SIZE] * 6 + [_FLOAT, _FLOAT, _INT],
    "linear": [_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 2,
    "dequantize": [_POINTER] * 4 + [_SIZE] * 5 + [_INT] * 2,
    "few_rows": [_POINTER] * 6 + [_SIZE] * 4 + [_INT] * 2,
    "round_rows": [_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2,
    "rescale": [_POINTER] * 5 + [_SIZE] * 2 + [_INT] * 2,
    "add_gumbel_noise": [_POINTER] * 3 + [_SIZE] * 2,
    "mask_logits": [_POINTER] * 3 + [_SIZE] * 3,
    "max_linear_rows": [_INT],
    "set_num_threads": [_INT],
}
RESULTS = {"max_linear_rows": _SIZE, "few_rows": _INT}


def is_usable(x: Tensor) -> bool:
    """Whether the functions of this module can be called with x (they may still hand it on to the reference)."""
    return x.is_cpu and _library() is not None


@functools.cache
def _library() -> Any:  # a ctypes.CDLL with SIGNATURES; None: this machine has none
    library = load_library()
    if library:
        for name, signature in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, RESULTS.get(name)
        library.set_num_threads(torch.get_num_threads())
    return library


@functools.cache
def _max_linear_rows(type_: int) -> int:
    return int(_library().max_linear_rows(type_))


# Shapes are read by .shape: a tensor's len() costs a microsecond.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    types = NORM_TYPES.get((x.dtype, weight.dtype))
    if types is None:
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    dim = weight.shape[0]
    _library().rms_norm(y.data_ptr(), x.data_ptr(), None, weight.data_ptr(), x.numel() // dim, dim, eps, *types)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    types = NORM_TYPES.get((x.dtype, weight.dtype))
    if types is None or residual.dtype != x.dtype or not residual.is_contiguous():
        return reference.add_rms_norm(x, residual, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    dim = weight.shape[0]
    pointers = y.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr()
    _library().rms_norm(*pointers, x.numel() // dim, dim, eps, *types)
    return y


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    type_ = TYPES.get(gate_up.dtype)
    if type_ is None:
        return reference.gated_activation(gate_up, kind)
    gate_up = gate_up.contiguous()
    rows, double = gate_up.shape
    y = gate_up.new_empty((rows, double // 2))
    _library().gated_activation(y.data_ptr(), gate_up.data_ptr(), rows, double // 2, ACTIVATIONS[kind], type_)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    type_ = TYPES.get(x.dtype)
    if type_ is None or weight.dtype != x.dtype or not weight.is_contiguous() or x.shape[0] > _max_linear_rows(type_):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    rows, in_features = x.shape
    y = x.new_empty((rows, weight.shape[0]))
    bias_pointer = bias.data_ptr() if bias is not None else None
    pointers = y.data_ptr(), x.data_ptr(), weight.data_ptr(), bias_pointer
    _library().linear(*pointers, rows, in_features, weight.shape[0], type_, type_)
    return y


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return gated_activation(linear(x, weight, bias), kind)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    type_ = TYPES.get(hidden.dtype)
    if type_ is None or weight.dtype != hidden.dtype or not weight.is_contiguous():
        return reference.logits(hidden, weight)
    hidden = hidden.contiguous()
    rows, in_features = hidden.shape
    y = torch.empty(rows, weight.shape[0])
    step = _max_linear_rows(type_)
    for first in range(0, rows, step):
        num_rows = min(step, rows - first)
        pointers = y[first].data_ptr(), hidden[first].data_ptr(), weight.data_ptr(), None
        _library().linear(*pointers, num_rows, in_features, weight.shape[0], type_, TYPES[torch.float32])
    return y


empty_grouped, put_grouped = reference.empty_grouped, reference.put_grouped


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    if x.dtype not in TYPES:
        return reference.grouped_linear(x, weight, bias)
    kind = INT4 if weight.bits == 4 else INT8
    few = _few_rows(x, weight.packed, weight.scales, weight.zeros, bias, weight.group_size, kind, x.dtype)
    if few is not None:
        return few
    tile = _tiles(x, weight.packed, weight.scales, weight.zeros, (1, weight.group_size), kind)

    return reference.by_tiles(x, weight.out_features, tile, bias, linear)


def grouped_gated_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, kind: str) -> Tensor:
    return gated_activation(grouped_linear(x, weight, bias), kind)


def add_rms_norm_rounded(x: Tensor, residual: Tensor, weight: Tensor, eps: float, stored: torch.dtype) -> RoundedRows:
    return _round_inputs(add_rms_norm(x, residual, weight, eps), stored)


def rounded_linear(x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    rows = x if isinstance(x, RoundedRows) else _round_inputs(x, numbers.dtype)
    if rows.dtype not in TYPES:
        return reference.rounded_linear(rows, numbers, scales, bias)
    sums: Tensor | None
    if numbers.dtype == torch.int8:
        sums = torch._int_mm(rows.numbers, numbers.t())
    else:
        sums = _few_rows(rows.numbers, numbers, None, None, None, numbers.shape[1], FP8, torch.float32)
    if sums is None:
        tile = _tiles(rows.numbers, numbers, None, None, (1, numbers.shape[1]), FP8)
        sums = reference.by_tiles(rows.numbers, numbers.shape[0], tile, None, linear)
    y = sums.new_empty(sums.shape, dtype=rows.dtype)
    pointers = y.data_ptr(), sums.data_ptr(), rows.scales.data_ptr(), scales.data_ptr()
    bias_pointer = bias.data_ptr() if bias is not None else None
    _library().rescale(*pointers, bias_pointer, *sums.shape, SUM_TYPES[sums.dtype], TYPES[rows.dtype])
    return y


def rounded_gated_linear(
    x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None
) -> Activations:
    y = gated_activation(rounded_linear(x, numbers, scales, bias), kind)
    return y if rounds_to is None else _round_inputs(y, rounds_to)


def blockwise_linear(
    x: Tensor, numbers: Tensor, scales: Tensor, block: tuple[int, int], rounds_inputs: bool, bias: Tensor | None
) -> Tensor:
    block_columns, in_features = block[1], x.shape[1]
    if x.dtype not in TYPES or (rounds_inputs and in_features % block_columns):
        return reference.blockwise_linear(x, numbers, scales, block, rounds_inputs, bias)
    wide = x.float()
    if rounds_inputs:
        rounded, x_scales = _round_rows(wide.view(-1, block_columns), numbers.dtype)
        wide = (rounded * x_scales.unsqueeze(1)).view(x.shape)
    y = reference.by_tiles(wide, numbers.shape[0], _tiles(wide, numbers, scales, None, block, FP8), None, linear)
    return (y if bias is None else y + bias).to(x.dtype)


def _few_rows(
    x: Tensor, numbers: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, group_size: int,
    kind: int, dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """The product, of `dtype`, without a tile of the weight in memory. None where that is not possible, or slower."""
    if x.dtype != torch.bfloat16 or kind == INT8:
        return None
    x = x.contiguous()
    y = x.new_empty((x.shape[0], numbers.shape[0]), dtype=dtype)
    others = [tensor.data_ptr() if tensor is not None else None for tensor in (scales, zeros, bias)]
    sizes = (*x.shape, numbers.shape[0], group_size)
    pointers = y.data_ptr(), x.data_ptr(), numbers.data_ptr(), *others
    return y if _library().few_rows(*pointers, *sizes, kind, TYPES[dtype]) else None


def _tiles(
    x: Tensor, numbers: Tensor, scales: Tensor | None, zeros: Tensor | None, block: tuple[int, int], kind: int
) -> Callable[[slice], Tensor]:
    """What works out some rows of a weight as numbers of x's type, each time in the same memory."""
    in_features = x.shape[1]
    memory = x.new_empty(min(reference.rows_of_a_tile(in_features), numbers.shape[0]), in_features)
    grids = [grid.data_ptr() if grid is not None else None for grid in (scales, zeros)]
    row_bytes = numbers.stride(0) * numbers.itemsize

    def tile(rows: slice) -> Tensor:
        sizes = rows.start, rows.stop - rows.start, in_features, block[1], block[0]
        pointer = numbers.data_ptr() + rows.start * row_bytes
        _library().dequantize(memory.data_ptr(), pointer, *grids, *sizes, kind, TYPES[x.dtype])
        return memory[: rows.stop - rows.start]

    return tile


def _round_inputs(x: Tensor, dtype: torch.dtype) -> RoundedRows:
    """e4m3 as numbers of x's type, which the products know."""
    if x.dtype not in TYPES:
        return reference.round_inputs(x, dtype)
    return RoundedRows(*_round_rows(x, dtype), x.dtype)


def _round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of x rounded to int8, or to e4m3 in x's type, and their scales, [rows]."""
    x = x.contiguous()
    is_int = dtype == torch.int8
    y, scales = torch.empty_like(x, dtype=dtype if is_int else x.dtype), torch.empty(x.shape[0])
    pointers = y.data_ptr(), scales.data_ptr(), x.data_ptr()
    _library().round_rows(*pointers, *x.shape, INT8 if is_int else FP8, TYPES[x.dtype])
    return y, scales


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    norm_dtype = q_norm.dtype if q_norm is not None else qkv.dtype
    types = NORM_TYPES.get((qkv.dtype, norm_dtype))
    if types is None or k_cache.dtype != qkv.dtype:
        return reference.rotate_and_store(qkv, positions, slot_mapping, cos_sin, k_cache, v_cache, q_norm, k_norm, eps)
    assert positions.dtype == slot_mapping.dtype == torch.int32, (positions.dtype, slot_mapping.dtype)
    qkv = qkv.contiguous()
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty((qkv.shape[0], num_heads, head_dim))
    _library().rotate_and_store(
        q.data_ptr(),
        qkv.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        cos_sin.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        q_norm.data_ptr() if q_norm is not None else None,
        k_norm.data_ptr() if k_norm is not None else None,
        qkv.shape[0],
        num_heads,
        num_kv_heads,
        head_dim,
        cos_sin.shape[1],
        block_size,
        eps,
        *types,
    )
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch, scale: float, window: int, softcap: float
) -> Tensor:
    type_ = TYPES.get(q.dtype)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    if type_ is None or k_cache.dtype != q.dtype or head_dim % 32 or block_size != BLOCK_SIZE:
        return reference.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
    assert batch.block_table.dtype == torch.int32, batch.block_table.dtype
    q = q.contiguous()
    out = torch.empty_like(q)
    _library().paged_attention(
        out.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        batch.query_start.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.rows.data_ptr(),
        batch.block_table.data_ptr(),
        batch.rows.shape[0],
        batch.block_table.shape[1],
        q.shape[1],
        num_kv_heads,
        head_dim,
        window,
        scale,
        softcap,
        type_,
    )
    return out


def sample(logits: Tensor, lines: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    return reference.sample(logits, lines, rows, ends, token_ids, add_gumbel_noise, best_of)


def take_best(logits: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    return reference.take_best(logits, rows, ends, token_ids, best_of)


def best_of(logits: Tensor) -> Tensor:
    """numpy goes through a row with vector instructions, which is ten times as fast as torch's argmax on a CPU."""
    return torch.from_numpy(logits.numpy().argmax(-1)).int()


def mask_logits(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    if not logits.is_contiguous():
        return reference.mask_logits(logits, words, rows)
    words, rows = words.contiguous(), rows.to(torch.int32).contiguous()
    pointers = [tensor.data_ptr() for tensor in (logits, words, rows)]
    _library().mask_logits(*pointers, len(rows), logits.shape[1], words.shape[1])
    return None


logprobs = reference.logprobs


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    if seeds.dtype != torch.int64:
        return reference.gumbel_noise(seeds, positions, vocab_size)
    return add_gumbel_noise(torch.zeros(len(seeds), vocab_size), seeds, positions)


def add_gumbel_noise(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """In place. seeds int64"""
    assert logits.is_contiguous(), logits.stride()
    assert logits.dtype == torch.float32, logits.dtype
    seeds, positions = seeds.contiguous(), positions.to(torch.int32).contiguous()
    _library().add_gumbel_noise(logits.data_ptr(), seeds.data_ptr(), positions.data_ptr(), *logits.shape)
    return logits
