"""Row-wise ops: norms, activations, rotary embedding with the write into the KV cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer

NORM_VECS = 4  # pieces of 16 bytes that a thread holds, as in kernels/norm.cuh


def builds(arch: str, dtype: torch.dtype, head_dim: int, kv_dtype: torch.dtype) -> Iterator[Build]:
    yield norm_build(arch, dtype)
    yield activation_build(arch, dtype)
    for width in (16 // dtype.itemsize, 1):
        yield rotary_build(arch, dtype, head_dim, kv_dtype, width)


def norm_build(arch: str, dtype: torch.dtype) -> Build:
    return define_build(arch, "norm.cu", scalar=dtype)


def activation_build(arch: str, dtype: torch.dtype) -> Build:
    return define_build(arch, "activation.cu", scalar=dtype)


def rotary_build(arch: str, dtype: torch.dtype, head_dim: int, kv_dtype: torch.dtype, width: int) -> Build:
    return define_build(arch, "rotary.cu", scalar=dtype, cached=kv_dtype, head_dim=head_dim, width=width)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    check_rows(x, y)
    if x.numel():
        _norm("rms_norm", x, weight, eps, y.data_ptr(), x.data_ptr())
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    check_rows(x, y, residual)
    if x.numel():
        _norm("add_rms_norm", x, weight, eps, y.data_ptr(), x.data_ptr(), residual.data_ptr())
    return y


def _norm(name: str, x: Tensor, weight: Tensor, eps: float, *pointers: int) -> None:
    """pointers: the first arguments of the kernel."""
    dim, suffix = x.shape[-1], weight_suffix(weight, x)
    num_rows, most = x.numel() // dim, most_norm_blocks(name, x, kernels.num_sms(x.get_device()))
    if num_rows > most:
        run = kernel(x, f"many_{name}s{suffix}", norm_build, x.dtype)
        run((most, 1, 1), _vec_threads(x), *pointers, weight.data_ptr(), dim, eps, num_rows)
    else:
        run = kernel(x, name + suffix, norm_build, x.dtype)
        run((num_rows, 1, 1), norm_threads(x), *pointers, weight.data_ptr(), dim, eps)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    dim = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], dim)
    check_rows(y, gate_up)
    if y.numel():
        threads = 128
        name = {"silu": "gated_silu", "gelu_tanh": "gated_gelu_tanh"}[kind]
        run = kernel(gate_up, name, activation_build, gate_up.dtype)
        grid = (y.numel() // dim, -(-dim * y.itemsize // (16 * threads)), 1)
        run(grid, threads, y.data_ptr(), gate_up.data_ptr(), dim)
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
    num_tokens, num_kv_heads, head_dim = len(qkv), k_cache.shape[1], k_cache.shape[3]
    num_all_heads = qkv.shape[1] // head_dim
    num_heads = num_all_heads - 2 * num_kv_heads
    check_rows(qkv)
    assert k_cache.is_contiguous(), k_cache.stride()
    assert v_cache.is_contiguous(), v_cache.stride()
    assert k_cache.dtype is v_cache.dtype, (k_cache.dtype, v_cache.dtype)
    assert cos_sin.dtype is torch.float32, cos_sin.dtype
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    norm_is_float = bool(norms) and weight_suffix(norms[0], qkv) != ""
    assert len({norm.dtype for norm in norms}) <= 1, norms
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        rotary_dim = cos_sin.shape[1]
        width = 16 // qkv.itemsize
        lanes = min(32, 1 << (-(-head_dim // (2 * width)) - 1).bit_length())  # of a team, as in rotary.cu
        heads_of_team = rotary_heads_of_team(num_tokens * num_all_heads * lanes, kernels.num_sms(qkv.get_device()))
        num_teams = num_tokens * -(-num_all_heads // heads_of_team)
        if rotary_dim // 2 % width:
            width = 1
        run = kernel(qkv, "rotate_and_store", rotary_build, qkv.dtype, head_dim, k_cache.dtype, width)
        threads = 128
        run(
            (-(-num_teams * lanes // threads), 1, 1),
            threads,
            *(q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), qkv.data_ptr()),
            *(positions.data_ptr(), slot_mapping.data_ptr(), cos_sin.data_ptr(), pointer(q_norm), pointer(k_norm)),
            *(norm_is_float, eps, num_tokens, num_heads, num_kv_heads, rotary_dim, heads_of_team),
        )
    return q


def rotary_heads_of_team(num_threads: int, num_sms: int) -> int:
    """Heads that a team of lanes of rotary.cu takes one after the other, where one each would take num_threads: more of
    them read the angles less often, once the GPU is full."""
    return next(heads for heads in (8, 4, 2, 1) if heads == 1 or num_threads >= heads * 1024 * num_sms)


def most_norm_blocks(name: str, x: Tensor, num_sms: int) -> int:
    """Blocks of threads for x, where it has more rows: each takes some, one after the other, and as many run at once.

    Measured on an H200, in us, with a block a row in brackets:

    | rows, numbers | rms_norm | add_rms_norm |
    |---|---|---|
    | 512, 4096 | 4.1 (5.1) | 5.8 (6.7) |
    | 1024, 4096 | 5.9 (8.6) | 10.4 (11.1) |
    | 2048, 4096 | 10.3 (13.6) | 20.0 (19.6) |
    | 8192, 4096 | 35.1 (45.8) | 74.9 (70.5) |
    | 2048, 2048 | 5.8 (10.0) | 10.4 (12.5) |
    | 8192, 2048 | 18.3 (28.0) | 37.2 (39.3) |
    | 2048, 1024 | 3.8 (9.3) | 5.8 (9.3) |
    | 8192, 1024 | 10.1 (20.1) | 19.9 (24.4) |
    """
    num_rows, threads, adds = x.numel() // x.shape[-1], _vec_threads(x), name == "add_rms_norm"
    if threads > 512 or (adds and threads > 256 and num_rows >= 2048):  # the first have no room for a second row
        return num_rows
    return num_sms * (1024 if adds else 1536) // threads


def _vec_threads(x: Tensor) -> int:
    """A thread for each 16 bytes of a row, in whole warps."""
    return -(-x.shape[-1] * x.itemsize // (16 * 32)) * 32


def norm_threads(x: Tensor) -> int:
    """Threads for a row of x: where there are many rows, few for each, so that more bytes are on their way; a few rows
    are done the sooner the more threads share one.

    Measured on an H200, rows of 4,096: add_rms_norm with 128, 256, 512 threads takes 6.0, 4.8, 4.4 us for 256 rows,
    22.0, 19.9, 22.6 for 2,048 and 71.5, 74.3, 80.2 for 8,192.
    """
    num_rows, vecs = x.numel() // x.shape[-1], _vec_threads(x)
    most = 1024 if num_rows < 512 else 256 if num_rows < 4096 else 128
    threads = max(min(vecs, most), -(-vecs // (32 * NORM_VECS)) * 32)
    assert threads <= 1024, f"rows of {x.shape[-1]} numbers are too long for the norm kernels"
    return threads


def weight_suffix(weight: Tensor, x: Tensor) -> str:
    if weight.dtype is x.dtype:
        return ""
    assert weight.dtype is torch.float32, (weight.dtype, x.dtype)
    return "_float_weight"
