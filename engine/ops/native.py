"""Native CPU bodies of the ops: one call into the library of kernels/cpu each, a few microseconds around the work.

Each knows bfloat16 and float32; what it does not know goes to the reference. Invariant: a pointer handed to the library
is that of a contiguous tensor which a local name keeps alive.
"""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch
from engine.ops import reference
from engine.ops.native_build import load_library

TYPES = {torch.bfloat16: 0, torch.float32: 1}
NORM_TYPES = {  # of the vectors and of the norm's weight
    (torch.bfloat16, torch.bfloat16): (0, 0),
    (torch.bfloat16, torch.float32): (0, 1),
    (torch.float32, torch.float32): (1, 1),
}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
BLOCK_SIZE = 16
_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "rms_norm": [_POINTER] * 4 + [_SIZE] * 2 + [_FLOAT, _INT, _INT],
    "gated_activation": [_POINTER] * 2 + [_SIZE] * 2 + [_INT] * 2,
    "rotate_and_store": [_POINTER] * 9 + [_SIZE] * 6 + [_FLOAT, _INT, _INT],
    "paged_attention": [_POINTER] * 8 + [_SIZE] * 6 + [_FLOAT, _FLOAT, _INT],
    "linear": [_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 2,
    "gumbel_noise": [_POINTER] * 3 + [_SIZE] * 2,
    "max_linear_rows": [_INT],
    "set_num_threads": [_INT],
}


def is_usable(x: Tensor) -> bool:
    """Whether the functions of this module can be called with x (they may still hand it on to the reference)."""
    return x.is_cpu and _library() is not None


@functools.cache
def _library() -> Any:  # a ctypes.CDLL with SIGNATURES; None: this machine has none
    library = load_library()
    if library:
        for name, signature in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, _SIZE if name == "max_linear_rows" else None
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
    return reference.sample(logits, lines, rows, ends, token_ids, noise_of=gumbel_noise)


take_best = reference.take_best
empty_grouped, put_grouped = reference.empty_grouped, reference.put_grouped
grouped_linear, grouped_gated_linear = reference.grouped_linear, reference.grouped_gated_linear
rounded_linear, rounded_gated_linear = reference.rounded_linear, reference.rounded_gated_linear
blockwise_linear = reference.blockwise_linear
logprobs = reference.logprobs


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    if seeds.dtype != torch.int64:
        return reference.gumbel_noise(seeds, positions, vocab_size)
    seeds, positions = seeds.contiguous(), positions.to(torch.int32).contiguous()
    noise = torch.empty(len(seeds), vocab_size)
    _library().gumbel_noise(noise.data_ptr(), seeds.data_ptr(), positions.data_ptr(), len(seeds), vocab_size)
    return noise
