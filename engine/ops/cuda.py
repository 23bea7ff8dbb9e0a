"""CUDA bodies of the ops: they pick tile and grid and launch the kernels of kernels/*.cu into new tensors.

Nothing here reads from the device, and grids depend on shapes and the batch's host numbers alone.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE
from engine.errors import UserError
from engine.ops import launcher
from engine.ops.compiler import Build, arch_of, cubins

SCALARS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "float"}
MAX_GROUP = 16  # query heads that a block of threads of attention/decode.cu takes
MAX_GROUP_ANY = 8  # the same in attention/decode_any.cu
MAX_SPLITS = 128  # of one context, as in attention/decode_any.cu
DECODE_BLOCKS_PER_SM = 3  # blocks of threads of attention/decode.cu that run at once
MAX_DECODE_PIECES = 1 << 18  # as in attention/decode.cu
FEW_ROWS = (8, 16)  # builds of gemm/few_rows.cu, by the most rows they take
FEW_ROWS_OCTETS = (2, 4, 6, 8)  # its kernels, by the eights of outputs in a tile


def warm_up(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, masks: bool = True
) -> None:
    """Compile (or find in the cache) and load every kernel that a model needs: none is compiled while it serves.

    masks: some of its layers have a window or a soft cap.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    builds = list(model_builds(_arch(index), dtype, head_dim, num_heads // num_kv_heads, masks))
    cubins(builds)
    for build in builds:
        launcher.load(build, index)


def model_builds(
    arch: str, dtype: torch.dtype, head_dim: int, heads_per_kv: int, masks: bool = True
) -> Iterator[Build]:
    """The builds that a model of these numbers runs on."""
    if dtype not in SCALARS:
        raise UserError(f"the CUDA kernels know bfloat16, float16 and float32, not {dtype}: choose one with --dtype")
    if head_dim % 8 or not 0 < head_dim <= 256:
        raise UserError(f"the CUDA kernels know head sizes of 8, 16, 24 to 256, not {head_dim}: use --device cpu")
    yield _build(arch, "norm.cu", dtype)
    yield _build(arch, "activation.cu", dtype)
    yield _build(arch, "sampling.cu", dtype)
    yield _build(arch, "rotary.cu", dtype, head_dim)
    for is_masked in (False, True) if masks else (False,):
        decode, prefill = attention_files(arch, dtype, head_dim, is_masked)
        max_group = MAX_GROUP if decode == "attention/decode.cu" else MAX_GROUP_ANY
        yield _build(arch, decode, dtype, head_dim, _group(heads_per_kv, max_group))
        if prefill != decode:
            yield _build(arch, prefill, dtype, head_dim)
    if dtype is not torch.float32:
        for rows in FEW_ROWS:
            yield _build(arch, "gemm/few_rows.cu", dtype, rows=rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, dim = torch.empty_like(x), x.shape[-1]
    _check_rows(x, y)
    if x.numel():
        kernel = _kernel(x, "norm.cu", "rms_norm" + _weight_suffix(weight, x))
        grid = (x.numel() // dim, 1, 1)
        kernel(grid, _norm_threads(x), y.data_ptr(), x.data_ptr(), weight.data_ptr(), dim, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, dim = torch.empty_like(x), x.shape[-1]
    _check_rows(x, y, residual)
    if x.numel():
        kernel = _kernel(x, "norm.cu", "add_rms_norm" + _weight_suffix(weight, x))
        grid, pointers = (x.numel() // dim, 1, 1), (y.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr())
        kernel(grid, _norm_threads(x), *pointers, dim, eps)
    return y


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    dim = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], dim)
    _check_rows(y, gate_up)
    if y.numel():
        threads = 128
        kernel = _kernel(gate_up, "activation.cu", {"silu": "gated_silu", "gelu_tanh": "gated_gelu_tanh"}[kind])
        grid = (y.numel() // dim, -(-dim * y.itemsize // (16 * threads)), 1)
        kernel(grid, threads, y.data_ptr(), gate_up.data_ptr(), dim)
    return y


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
    _check_rows(qkv, k_cache, v_cache)
    assert cos_sin.dtype is torch.float32, cos_sin.dtype
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    norm_is_float = bool(norms) and _weight_suffix(norms[0], qkv) != ""
    assert len({norm.dtype for norm in norms}) <= 1, norms
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        threads = 256
        lanes_per_head = min(32, 1 << (head_dim * qkv.itemsize // 16 - 1).bit_length())  # as in rotary.cu
        _kernel(qkv, "rotary.cu", "rotate_and_store", head_dim)(
            (num_tokens, -(-num_all_heads * lanes_per_head // threads), 1),
            threads,
            *(q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), qkv.data_ptr()),
            *(positions.data_ptr(), slot_mapping.data_ptr(), cos_sin.data_ptr(), _pointer(q_norm), _pointer(k_norm)),
            *(norm_is_float, eps, num_heads, num_kv_heads, cos_sin.shape[1]),
        )
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch, scale: float, window: int, softcap: float
) -> Tensor:
    """Requests of one token go to a decode kernel, chunks to a prefill kernel, where tensor cores know the type."""
    _check_rows(q, k_cache, v_cache)
    assert k_cache.shape[2] == BLOCK_SIZE, k_cache.shape
    out = torch.empty_like(q)
    is_masked = bool(window or softcap)
    decode, prefill = attention_files(_arch(q.get_device()), q.dtype, q.shape[2], is_masked)
    num_decodes = len(q) if prefill == decode else batch.num_decodes
    if num_decodes and decode == "attention/decode.cu":
        _decode(out, q, k_cache, v_cache, batch, scale, window, softcap)
    elif num_decodes:
        _decode_any(out, q, k_cache, v_cache, batch, num_decodes, scale, window, softcap)
    if num_decodes < len(q):
        _prefill(prefill, out, q, k_cache, v_cache, batch, scale, window, softcap)
    return out


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    noise = torch.empty(len(seeds), vocab_size, dtype=torch.float32, device=seeds.device)
    positions = positions.long()
    assert seeds.dtype is torch.int64, seeds.dtype
    if noise.numel():
        threads = 128
        kernel = _kernel(noise, "sampling.cu", "gumbel_noise")
        grid = (len(seeds), -(-vocab_size // (4 * threads)), 1)
        kernel(grid, threads, noise.data_ptr(), seeds.data_ptr(), positions.data_ptr(), vocab_size)
    return noise


def decode_tile(head_dim: int) -> tuple[int, int]:
    """(warps, stages of one KV block in each): DECODE_BLOCKS_PER_SM blocks of threads fill the shared memory of a large
    GPU's multiprocessor, and one fits into the 99 KiB of a small one's."""
    return (4, 4) if head_dim <= 64 else (4, 2) if head_dim <= 128 else (2, 2)


def decode_shared_bytes(head_dim: int) -> int:
    """16 keys and values in each stage of each warp, as in attention/decode.cu."""
    warps, stages = decode_tile(head_dim)
    return warps * stages * 2 * BLOCK_SIZE * (head_dim + 8) * 2


def num_splits(num_blocks: int, max_context: int, num_sms: int) -> int:
    """Parts that contexts are cut into: enough for four blocks of threads on each multiprocessor, but no part so short
    (256 tokens) that joining the parts costs more than it saves."""
    wanted = -(-4 * num_sms // num_blocks)
    return max(1, min(wanted, -(-max_context // 256), MAX_SPLITS))


def attention_files(arch: str, dtype: torch.dtype, head_dim: int, is_masked: bool) -> tuple[str, str]:
    """The kernels that decode and prefill; the same one where tensor cores do not know the type or the head size.

    decode.cu and prefill_sm90.cu know windows, soft caps and wide heads too, but in their present form a GPU has
    checked them without: the rest goes to the kernels before them, which a GPU has checked with everything.
    """
    if not _fits_tensor_cores(dtype, head_dim):
        return "attention/decode_any.cu", "attention/decode_any.cu"
    if is_masked or head_dim > 128:
        return "attention/decode_any.cu", "attention/prefill.cu"
    has_own = arch == "sm_90a" and head_dim in (64, 128)  # the head sizes that fill the tiles of Hopper's kernel
    return "attention/decode.cu", "attention/prefill_sm90.cu" if has_own else "attention/prefill.cu"


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


def prefill_tile(head_dim: int) -> tuple[int, int]:
    """(warps of 16 query rows, keys in a stage): what registers and the 99 KiB of shared memory of small GPUs hold."""
    return (4, 32) if head_dim > 128 else (8, 64)


def prefill_shared_bytes(head_dim: int) -> int:
    """Two stages of keys and values; queries of wide heads have a place of their own (as in attention/prefill.cu)."""
    warps, keys = prefill_tile(head_dim)
    num_rows = 4 * keys + (16 * warps if head_dim > 128 else 0)
    return num_rows * (head_dim + 8) * 2


def prefill_sm90_tile(head_dim: int) -> tuple[int, int, int]:
    """(warpgroups of 64 query rows, keys in a tile, tiles in flight) of attention/prefill_sm90.cu."""
    return (2, 128, 3) if head_dim > 64 else (3, 128, 4)


def prefill_sm90_shared_bytes(head_dim: int) -> int:
    """Queries, tiles of keys and values, barriers, and what it takes to begin at a multiple of 1 KiB."""
    warpgroups, keys, stages = prefill_sm90_tile(head_dim)
    return (64 * warpgroups + 2 * stages * keys) * head_dim * 2 + 4 * stages * 8 + 1024


def _octets(x: Tensor, weight: Tensor) -> int:
    if x.dtype is torch.float32:
        return 0
    device = x.get_device()
    return few_rows_octets(len(x), x.shape[1], len(weight), _num_sms(device), few_rows_ring_bytes(_arch(device)))


def _few_rows(octets: int, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Reading the weight starts while the kernel launched last may still run: that one must not be what writes it."""
    (num_rows, inputs), out = x.shape, len(weight)
    y = x.new_empty(num_rows, out, dtype=dtype)
    _check_rows(x, weight)
    kernel = _kernel(x, "gemm/few_rows.cu", f"few_rows_{octets}", rows=next(n for n in FEW_ROWS if num_rows <= n))
    kernel(
        (min(_num_sms(x.get_device()), -(-out // (8 * octets))), 1, 1),
        256,
        *(y.data_ptr(), x.data_ptr(), weight.data_ptr(), _pointer(bias)),
        *(dtype is torch.float32, num_rows, inputs, out),
        shared_bytes=few_rows_ring_bytes(_arch(x.get_device())),
    )
    return y


def _decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attention of the batch's decodes: its first num_decodes tokens, each of a request of its own."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    group = _group(num_heads // num_kv_heads, MAX_GROUP)
    warps, _ = decode_tile(head_dim)
    num_blocks = DECODE_BLOCKS_PER_SM * _num_sms(q.get_device())
    num_lists = batch.num_decodes * num_kv_heads * -(-num_heads // num_kv_heads // group)
    num_pieces = num_lists + num_blocks  # at most
    assert num_pieces <= MAX_DECODE_PIECES, (num_lists, num_blocks)
    num_parts = num_pieces * group
    parts = torch.empty(num_parts * (head_dim + 1), dtype=torch.float32, device=q.device)  # results, then their weights
    part_weights = parts.data_ptr() + num_parts * head_dim * parts.itemsize
    _, context_lens, rows, block_table = _batch_pointers(batch)
    _kernel(q, "attention/decode.cu", "decode", head_dim, group)(
        (num_blocks, 1, 1),
        32 * warps,
        *(out.data_ptr(), parts.data_ptr(), part_weights, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *(context_lens, rows, block_table, batch.num_decodes, batch.block_table.shape[1], num_heads, num_kv_heads),
        *(scale, window, softcap),
        shared_bytes=decode_shared_bytes(head_dim),
    )


def _decode_any(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    num_tokens: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attention of the first num_tokens tokens, each on its own."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    group = _group(num_heads // num_kv_heads, MAX_GROUP_ANY)
    blocks_per_token = num_kv_heads * -(-num_heads // num_kv_heads // group)
    max_context = min(batch.max_context_len, window + BLOCK_SIZE) if window else batch.max_context_len
    splits = num_splits(num_tokens * blocks_per_token, max_context, _num_sms(q.get_device()))
    num_parts = num_tokens * num_heads * splits if splits > 1 else 0
    parts = torch.empty(num_parts * (head_dim + 1), dtype=torch.float32, device=q.device)  # results, then their weights
    part_weights = parts.data_ptr() + num_parts * head_dim * parts.itemsize
    _kernel(q, "attention/decode_any.cu", "decode_any", head_dim, group)(
        (num_tokens, blocks_per_token, splits),
        128,
        *(out.data_ptr(), parts.data_ptr(), part_weights, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *_batch_pointers(batch),
        *(batch.num_decodes, len(batch.context_lens), batch.block_table.shape[1], num_heads, num_kv_heads),
        *(scale, window, softcap),
    )
    if splits > 1:
        combine = _kernel(q, "attention/decode_any.cu", "combine", head_dim, group)
        combine((num_tokens, num_heads, 1), 128, out.data_ptr(), parts.data_ptr(), part_weights, splits)


def _prefill(
    file: str,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attention of the requests after the batch's decodes."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    heads_per_kv = num_heads // num_kv_heads
    num_requests = len(batch.context_lens) - batch.num_decodes
    numbers = (batch.block_table.shape[1], num_heads, num_kv_heads, scale, window, softcap)
    kernel = _kernel(q, file, "prefill", head_dim)
    if file == "attention/prefill_sm90.cu":
        warpgroups, _, _ = prefill_sm90_tile(head_dim)
        num_rows = 64 * warpgroups
        num_pieces = ((len(q) - batch.num_decodes) * heads_per_kv + num_requests * (num_rows - 1)) // num_rows
        kernel(
            (num_kv_heads, num_pieces, 1),
            128 * (warpgroups + 1),
            *(_rows_map(cache, head_dim) for cache in (k_cache, v_cache)),
            *(out.data_ptr(), q.data_ptr(), *_batch_pointers(batch)),
            *(batch.num_decodes, num_requests, *numbers),
            shared_bytes=prefill_sm90_shared_bytes(head_dim),
        )
    else:
        warps, _ = prefill_tile(head_dim)
        kernel(
            (-(-batch.max_query_len * heads_per_kv // (16 * warps)), num_kv_heads, num_requests),
            32 * warps,
            *(out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), *_batch_pointers(batch)),
            *(batch.num_decodes, *numbers),
            shared_bytes=prefill_shared_bytes(head_dim),
        )


def _rows_map(cache: Tensor, head_dim: int) -> bytes:
    """A cache as a matrix with a row for each token and KV head, read a block at a time."""
    return launcher.tensor_map(cache.data_ptr(), cache.numel() // head_dim, head_dim, BLOCK_SIZE)


def _batch_pointers(batch: ForwardBatch) -> tuple[int, int, int, int]:
    tensors = (batch.query_start, batch.context_lens, batch.rows, batch.block_table)
    for tensor in tensors:
        assert tensor.dtype is torch.int32, tensor.dtype
    query_start, context_lens, rows, block_table = (tensor.data_ptr() for tensor in tensors)
    return query_start, context_lens, rows, block_table


def _fits_tensor_cores(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype is not torch.float32 and head_dim % 16 == 0


def _group(heads_per_kv: int, max_group: int) -> int:
    """Query heads a block of a decode kernel takes: all that share a KV head, or an even share of them."""
    return -(-heads_per_kv // -(-heads_per_kv // max_group))


def _norm_threads(x: Tensor) -> int:
    """Threads for a row of x: one for 16 bytes up to 4 KiB, then up to four times 16 bytes each."""
    vecs = x.shape[-1] * x.itemsize // 16
    threads = -(-vecs // 32) * 32 if vecs <= 256 else max(256, -(-vecs // 128) * 32)
    assert threads <= 1024, f"rows of {x.shape[-1]} numbers are too long for the norm kernels"
    return threads


def _weight_suffix(weight: Tensor, x: Tensor) -> str:
    if weight.dtype is x.dtype:
        return ""
    assert weight.dtype is torch.float32, (weight.dtype, x.dtype)
    return "_float_weight"


def _check_rows(*tensors: Tensor) -> None:
    """Kernels read and write 16 bytes at a time, in tensors of one type without gaps."""
    for tensor in tensors:
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.dtype is tensors[0].dtype, (tensor.dtype, tensors[0].dtype)
        assert tensor.shape[-1] * tensor.itemsize % 16 == 0, tensor.shape


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kernel(x: Tensor, file: str, name: str, head_dim: int = 0, group: int = 0, rows: int = 0) -> launcher.Kernel:
    return _loaded(x.get_device(), x.dtype, file, name, head_dim, group, rows)


@cache
def _loaded(
    device: int, dtype: torch.dtype, file: str, name: str, head_dim: int, group: int, rows: int
) -> launcher.Kernel:
    kernel = launcher.load(_build(_arch(device), file, dtype, head_dim, group, rows), device)[name]
    if file == "attention/prefill.cu":
        kernel.allow_shared_bytes(prefill_shared_bytes(head_dim))
    if file == "attention/prefill_sm90.cu":
        kernel.allow_shared_bytes(prefill_sm90_shared_bytes(head_dim))
    if rows:
        kernel.allow_shared_bytes(few_rows_ring_bytes(_arch(device)))
    if name == "decode":
        kernel.allow_shared_bytes(decode_shared_bytes(head_dim))
    return kernel


def _build(arch: str, file: str, dtype: torch.dtype, head_dim: int = 0, group: int = 0, rows: int = 0) -> Build:
    defines = [f"SCALAR={SCALARS[dtype]}"] if file != "sampling.cu" else []
    defines += [f"HEAD_DIM={head_dim}"] if head_dim else []
    defines += [f"GROUP={group}"] if group else []
    defines += [f"ROWS={rows}", f"RING_BYTES={few_rows_ring_bytes(arch)}"] if rows else []
    if file == "attention/decode.cu":
        warps, stages = decode_tile(head_dim)
        defines += [f"WARPS={warps}", f"STAGES={stages}"]
    if file == "attention/prefill.cu":
        warps, keys = prefill_tile(head_dim)
        defines += [f"WARPS={warps}", f"KEYS={keys}"]
    if file == "attention/prefill_sm90.cu":
        warpgroups, keys, stages = prefill_sm90_tile(head_dim)
        defines += [f"CONSUMERS={warpgroups}", f"KEYS={keys}", f"STAGES={stages}"]
    return Build(file, arch, tuple(defines))


@cache
def _arch(device: int) -> str:
    return arch_of(torch.cuda.get_device_capability(device))


@cache
def _num_sms(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
