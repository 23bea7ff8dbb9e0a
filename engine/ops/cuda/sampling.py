"""Random noise for the sampler."""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.ops.compiler import Build
from engine.ops.cuda.kernels import define_build, kernel


def builds(arch: str) -> Iterator[Build]:
    yield sampling_build(arch)


def sampling_build(arch: str) -> Build:
    return define_build(arch, "sampling.cu")


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
