"""Attention over the paged KV cache: requests of one token go to a decode kernel, chunks to a prefill kernel."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE
from engine.errors import UserError
from engine.ops import launcher
from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.kernels import check_rows, define_build, kernel

MAX_GROUP_ANY = 8  # query heads that a block of threads of attention/decode_any.cu takes
MAX_SPLITS = 128  # of one context, as in attention/decode_any.cu
MAX_GRID = 1024  # as in attention/decode.cu and attention/prefill_sm90.cu
COPY_WARPS = 4  # as in attention/decode.cu

_is_batch_invariant = False


def use_batch_invariant(is_on: bool) -> None:
    """Whether all goes to the prefill kernel, with no context cut: a token's result depends on its request alone."""
    global _is_batch_invariant
    _is_batch_invariant = is_on


def builds(
    arch: str, dtype: torch.dtype, head_dim: int, heads_per_kv: int, masks: bool, kv_dtype: torch.dtype
) -> Iterator[Build]:
    """masks: some layers have a window or a soft cap."""
    if kv_dtype is not dtype and not _fits_tensor_cores(dtype, head_dim):
        raise UserError(
            f"an fp8 KV cache needs bfloat16 or float16 and a head size of 16, 32, 48 and so on, not {dtype} and "
            f"{head_dim}: leave out --kv-cache-dtype"
        )
    for is_masked in (False, True) if masks else (False,):
        decode, prefill = attention_files(arch, dtype, head_dim, is_masked)
        if decode == "attention/decode.cu":
            yield decode_build(arch, dtype, kv_dtype, head_dim, decode_group(head_dim, heads_per_kv))
        else:
            yield decode_any_build(arch, dtype, head_dim, _group(heads_per_kv, MAX_GROUP_ANY))
        if prefill != decode:
            yield PREFILL_BUILDS[prefill](arch, dtype, kv_dtype, head_dim)


def decode_build(arch: str, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, group: int) -> Build:
    warps, stages, shared_bytes = decode_tile(arch, kv_dtype, head_dim, group)
    constants: dict[str, int | torch.dtype] = {
        "scalar": dtype,
        "cached": kv_dtype,
        "head_dim": head_dim,
        "group": group,
        "warps": warps,
        "stages": stages,
    }
    return define_build(arch, "attention/decode.cu", shared_bytes, **constants)


def decode_any_build(arch: str, dtype: torch.dtype, head_dim: int, group: int) -> Build:
    return define_build(arch, "attention/decode_any.cu", scalar=dtype, head_dim=head_dim, group=group)


def prefill_build(arch: str, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> Build:
    warps, keys = prefill_tile(head_dim)
    constants: dict[str, int | torch.dtype] = {
        "scalar": dtype,
        "cached": kv_dtype,
        "head_dim": head_dim,
        "warps": warps,
        "keys": keys,
    }
    return define_build(arch, "attention/prefill.cu", prefill_shared_bytes(kv_dtype, head_dim), **constants)


def prefill_sm90_build(arch: str, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> Build:
    warpgroups, keys, stages = prefill_sm90_tile(head_dim)
    constants: dict[str, int | torch.dtype] = {
        "scalar": dtype,
        "cached": kv_dtype,
        "head_dim": head_dim,
        "consumers": warpgroups,
        "keys": keys,
        "stages": stages,
    }
    return define_build(arch, "attention/prefill_sm90.cu", prefill_sm90_shared_bytes(head_dim), **constants)


PREFILL_BUILDS = {"attention/prefill.cu": prefill_build, "attention/prefill_sm90.cu": prefill_sm90_build}


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch, scale: float, window: int, softcap: float
) -> Tensor:
    """Requests of one token go to a decode kernel, chunks to a prefill kernel, where tensor cores know the type."""
    check_rows(q)
    check_rows(k_cache, v_cache)
    assert k_cache.shape[2] == BLOCK_SIZE, k_cache.shape
    out = torch.empty_like(q)
    is_masked = bool(window or softcap)
    decode, prefill = attention_files(kernels.arch(q.get_device()), q.dtype, q.shape[2], is_masked)
    if _is_batch_invariant:
        batch = replace(batch, num_decodes=0)
    if prefill == decode:
        _decode_any(out, q, k_cache, v_cache, batch, scale, window, softcap)
        return out
    if batch.num_decodes:
        _decode(out, q, k_cache, v_cache, batch, scale, window, softcap)
    if batch.num_decodes < len(q):
        run = _prefill_sm90 if prefill == "attention/prefill_sm90.cu" else _prefill
        run(out, q, k_cache, v_cache, batch, scale, window, softcap)
    return out


def attention_files(arch: str, dtype: torch.dtype, head_dim: int, is_masked: bool) -> tuple[str, str]:
    """The kernels that decode and prefill; the same one where tensor cores do not know the type or the head size.

    prefill_sm90.cu knows windows and soft caps too, but in its present form a GPU has checked it without: those go to
    prefill.cu, which a GPU has checked with everything.
    """
    if not _fits_tensor_cores(dtype, head_dim):
        return "attention/decode_any.cu", "attention/decode_any.cu"
    if is_masked or head_dim > 128:
        return "attention/decode.cu", "attention/prefill.cu"
    has_own = arch == "sm_90a" and head_dim in (64, 128)  # the head sizes that fill the tiles of Hopper's kernel
    return "attention/decode.cu", "attention/prefill_sm90.cu" if has_own else "attention/prefill.cu"


def decode_tile(arch: str, kv_dtype: torch.dtype, head_dim: int, group: int) -> tuple[int, int, int]:
    """(computing warps, stages of one KV block in the ring, bytes of shared memory) of attention/decode.cu.

    The ring is as long as shared memory has room beside what the warps' results take, and a multiple of the warps. Of
    eight warps, the copying ones included, each can have 255 registers.
    """
    limit = {"sm_80": 163, "sm_90a": 227, "sm_100a": 227}.get(arch, 99) << 10
    stage = 2 * BLOCK_SIZE * head_dim * kv_dtype.itemsize + 16  # with its barriers
    results = (group * (head_dim + 4) + 2 * 8 * -(-group // 8)) * 4  # of each warp
    most = {warps: (limit - warps * results - 16) // stage // warps * warps for warps in (4, 8)}
    warps = 8 if most[8] and group * head_dim <= 1024 and head_dim <= 128 else 4
    return warps, most[warps], most[warps] * stage + warps * results + 16


def decode_group(head_dim: int, heads_per_kv: int) -> int:
    """Query heads that a block of threads of attention/decode.cu takes: as many as its registers hold."""
    return _group(heads_per_kv, 16 if head_dim <= 128 else 8)


def num_splits(num_blocks: int, max_context: int, num_sms: int) -> int:
    """Parts that contexts are cut into: enough for four blocks of threads on each multiprocessor, but no part so short
    (256 tokens) that joining the parts costs more than it saves."""
    wanted = -(-4 * num_sms // num_blocks)
    return max(1, min(wanted, -(-max_context // 256), MAX_SPLITS))


def prefill_tile(head_dim: int) -> tuple[int, int]:
    """(warps of 16 query rows, keys in a stage): what registers and the 99 KiB of shared memory of small GPUs hold."""
    return (4, 32) if head_dim > 128 else (8, 64)


def prefill_shared_bytes(kv_dtype: torch.dtype, head_dim: int) -> int:
    """As in attention/prefill.cu: two stages of keys and values, and a place for the queries of wide heads; from a
    narrow cache one stage, one as it is cached, and always a place for queries."""
    warps, keys = prefill_tile(head_dim)
    is_narrow = kv_dtype.itemsize == 1
    num_rows = (2 if is_narrow else 4) * keys + (16 * warps if head_dim > 128 or is_narrow else 0)
    return num_rows * (head_dim + 8) * 2 + (2 * keys * head_dim if is_narrow else 0)


def prefill_sm90_tile(head_dim: int) -> tuple[int, int, int]:
    """(warpgroups of 64 query rows, keys or values in a tile, tiles in flight) of attention/prefill_sm90.cu."""
    return (2, 128, 5) if head_dim > 64 else (2, 128, 10)


def prefill_sm90_shared_bytes(head_dim: int) -> int:
    """Queries of two items, tiles, barriers, the items, and what it takes to begin at a multiple of 1 KiB."""
    warpgroups, keys, stages = prefill_sm90_tile(head_dim)
    barriers, items = 2 * stages + 2 * 3, 2
    return (2 * 64 * warpgroups + stages * keys) * head_dim * 2 + barriers * 8 + items * 48 + 1024


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
    group = decode_group(head_dim, num_heads // num_kv_heads)
    warps, _, _ = decode_tile(kernels.arch(q.get_device()), k_cache.dtype, head_dim, group)
    grid = min(kernels.num_sms(q.get_device()), MAX_GRID)
    parts, part_weights = _new_parts(q, 2 * grid * group)
    _, context_lens, rows, block_table = _batch_pointers(batch)
    kernel(q, "decode", decode_build, q.dtype, k_cache.dtype, head_dim, group)(
        (grid, 1, 1),
        32 * (warps + COPY_WARPS),
        *(out.data_ptr(), parts.data_ptr(), part_weights, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *(context_lens, rows, block_table, batch.num_decodes, batch.block_table.shape[1], num_heads, num_kv_heads),
        *(scale, window, softcap),
    )


def _decode_any(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attention of all tokens, each on its own."""
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k_cache.shape[1]
    group = _group(num_heads // num_kv_heads, MAX_GROUP_ANY)
    blocks_per_token = num_kv_heads * -(-num_heads // num_kv_heads // group)
    max_context = min(batch.max_context_len, window + BLOCK_SIZE) if window else batch.max_context_len
    splits = num_splits(num_tokens * blocks_per_token, max_context, kernels.num_sms(q.get_device()))
    parts, part_weights = _new_parts(q, num_tokens * num_heads * splits if splits > 1 else 0)
    kernel(q, "decode_any", decode_any_build, q.dtype, head_dim, group)(
        (num_tokens, blocks_per_token, splits),
        128,
        *(out.data_ptr(), parts.data_ptr(), part_weights, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *_batch_pointers(batch),
        *(batch.num_decodes, len(batch.context_lens), batch.block_table.shape[1], num_heads, num_kv_heads),
        *(scale, window, softcap),
    )
    if splits > 1:
        combine = kernel(q, "combine", decode_any_build, q.dtype, head_dim, group)
        combine((num_tokens, num_heads, 1), 128, out.data_ptr(), parts.data_ptr(), part_weights, splits)


def _prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attention of the requests after the batch's decodes, by attention/prefill.cu."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    num_requests = len(batch.context_lens) - batch.num_decodes
    num_rows = 16 * prefill_tile(head_dim)[0]  # of an item
    num_stacked = (len(q) - batch.num_decodes) * (num_heads // num_kv_heads)
    num_items = num_kv_heads * ((num_stacked + num_requests * (num_rows - 1)) // num_rows)  # room for them, and no less
    kernel(q, "prefill", prefill_build, q.dtype, k_cache.dtype, head_dim)(
        (num_items, 1, 1),
        2 * num_rows,
        *(k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), q.data_ptr(), *_batch_pointers(batch)),
        *(batch.num_decodes, num_requests, batch.block_table.shape[1], num_heads, num_kv_heads),
        *(scale, window, softcap),
    )


def _prefill_sm90(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """The same by attention/prefill_sm90.cu."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    num_requests, is_narrow = len(batch.context_lens) - batch.num_decodes, k_cache.dtype is not q.dtype
    num_rows, grid = 64 * prefill_sm90_tile(head_dim)[0], min(kernels.num_sms(q.get_device()), MAX_GRID)
    num_part_rows = 0 if _is_batch_invariant else 2 * grid * num_rows  # none: the sums of a row are in one order alone
    parts, part_weights = _new_parts(q, num_part_rows)
    kernel(q, "prefill", prefill_sm90_build, q.dtype, k_cache.dtype, head_dim)(
        (grid, 1, 1),
        2 * num_rows + 128 * (1 + is_narrow),
        *(_octets_map(k_cache), _octets_map(v_cache), k_cache.data_ptr(), v_cache.data_ptr()),
        *(out.data_ptr(), parts.data_ptr(), part_weights, q.data_ptr(), *_batch_pointers(batch)),
        *(batch.num_decodes, num_requests, batch.block_table.shape[1], num_heads, num_kv_heads),
        *(scale, window, softcap),
    )


def _octets_map(cache: Tensor) -> bytes:
    """A cache as a matrix with a row for each token and KV head, read a block at a time; nothing of a narrow one."""
    head_dim = cache.shape[3]
    if cache.itemsize == 1:
        return bytes(128)
    return launcher.octets_map(cache.data_ptr(), cache.numel() // head_dim, head_dim, BLOCK_SIZE)


def _new_parts(q: Tensor, num_parts: int) -> tuple[Tensor, int]:
    """Room for float32 results [num_parts, head_dim] of parts of contexts, and behind them the address of their weights
    [num_parts]."""
    head_dim = q.shape[2]
    parts = torch.empty(num_parts * (head_dim + 1), dtype=torch.float32, device=q.device)
    return parts, parts.data_ptr() + num_parts * head_dim * parts.itemsize


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
