"""From logits to tokens, and the random numbers of the draws."""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.ops import reference
from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.kernels import define_build, kernel

mask_logits = reference.mask_logits  # of the few rows that have a mask
THREADS, SHARED_BYTES = 768, 40 << 10  # as in kernels/sampling.cu


def builds(arch: str) -> Iterator[Build]:
    yield sampling_build(arch)


def sampling_build(arch: str) -> Build:
    return define_build(arch, "sampling.cu", SHARED_BYTES)


def sample(logits: Tensor, lines: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    _check(logits, lines, rows, ends, token_ids)
    tokens = torch.empty_like(rows)
    if len(rows):
        blocks = _blocks_per_row(logits)
        kernel(logits, "sample", sampling_build)(
            (blocks, len(rows), 1),
            THREADS,
            *(tokens.data_ptr(), logits.data_ptr(), lines.data_ptr(), rows.data_ptr(), ends.data_ptr()),
            *(token_ids.data_ptr(), logits.shape[1], lines.shape[1], token_ids.shape[1]),
            cluster=blocks,
        )
    return tokens


def take_best(logits: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    _check(logits, rows, ends, token_ids)
    tokens = torch.empty_like(rows)
    if len(rows):
        blocks = _blocks_per_row(logits)
        kernel(logits, "take_best", sampling_build)(
            (blocks, len(rows), 1),
            THREADS,
            *(tokens.data_ptr(), logits.data_ptr(), rows.data_ptr(), ends.data_ptr(), token_ids.data_ptr()),
            *(logits.shape[1], token_ids.shape[1]),
            cluster=blocks,
        )
    return tokens


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    token_ids = token_ids.int().contiguous()
    _check(logits, token_ids)
    chosen, ranks = logits.new_empty(num_rows), torch.empty_like(token_ids)
    top_values, top_ids = logits.new_empty(num_rows, num_top), token_ids.new_empty(num_rows, num_top)
    if num_rows:
        blocks = _blocks_per_row(logits)
        kernel(logits, "logprobs", sampling_build)(
            (blocks, num_rows, 1),
            THREADS,
            *(chosen.data_ptr(), ranks.data_ptr(), top_values.data_ptr(), top_ids.data_ptr()),
            *(logits.data_ptr(), token_ids.data_ptr(), vocab_size, num_top),
            cluster=blocks,
        )
    return chosen, ranks, top_values, top_ids


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    noise = torch.empty(len(seeds), vocab_size, dtype=torch.float32, device=seeds.device)
    positions = positions.long()
    assert seeds.dtype is torch.int64, seeds.dtype
    if noise.numel():
        threads = 128
        run = kernel(noise, "gumbel_noise", sampling_build)
        grid = (len(seeds), -(-vocab_size // (4 * threads)), 1)
        run(grid, threads, noise.data_ptr(), seeds.data_ptr(), positions.data_ptr(), vocab_size)
    return noise


def blocks_per_row(num_rows: int, num_sms: int) -> int:
    """Blocks of threads that share a row: a cluster of up to 8, as long as each has a multiprocessor of its own."""
    return next((blocks for blocks in (8, 4, 2) if blocks * num_rows <= num_sms), 1)


def _blocks_per_row(logits: Tensor) -> int:
    device = logits.get_device()
    has_clusters = kernels.arch(device).startswith(("sm_9", "sm_1"))
    return blocks_per_row(len(logits), kernels.num_sms(device)) if has_clusters else 1


def _check(logits: Tensor, *indices: Tensor) -> None:
    assert logits.dtype is torch.float32, logits.dtype
    assert logits.is_contiguous(), logits.stride()
    for tensor in indices:
        assert tensor.dtype is torch.int32, tensor.dtype
        assert tensor.is_contiguous(), tensor.stride()
