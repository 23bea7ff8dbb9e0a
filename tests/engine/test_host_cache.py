"""Copies between the cache and memory of the host, against lists. On a CPU: the order of things on a GPU is its own."""

import random

import pytest
import torch
from torch import Tensor

from engine import host_cache
from engine.errors import UserError
from engine.host_cache import HostCache

NUM_PARTS, NUM_BLOCKS, NUM_HOST_BLOCKS = 4, 12, 7


def make_cache(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_PARTS, NUM_BLOCKS, 2, 16, 8, generator=generator).to(dtype)


def make_host_cache(cache: Tensor) -> HostCache:
    block_bytes = cache[:, 0].numel() * cache.element_size()
    return HostCache(cache, NUM_HOST_BLOCKS * block_bytes + block_bytes // 2)


@pytest.mark.parametrize("num_staged", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_random_walk_agrees_with_lists(dtype: torch.dtype, num_staged: int, monkeypatch):
    cache, chance = make_cache(dtype), random.Random(3)
    monkeypatch.setattr(host_cache, "STAGING_BYTES", num_staged * cache[:, 0].numel() * cache.element_size())
    copies = make_host_cache(cache)
    assert copies.num_blocks == NUM_HOST_BLOCKS
    device = [cache[:, block].clone() for block in range(NUM_BLOCKS)]
    host = [torch.zeros_like(device[0])] * NUM_HOST_BLOCKS
    for _ in range(50):
        num = chance.randint(0, NUM_HOST_BLOCKS)
        sources, targets = chance.sample(range(NUM_HOST_BLOCKS), num), chance.sample(range(NUM_BLOCKS), num)
        to_host = list(zip(targets, sources, strict=True))
        to_device = list(zip(chance.sample(sources, num), chance.sample(range(NUM_BLOCKS), num), strict=True))
        copies.copy(to_host, to_device)
        for block_id, host_id in to_host:
            host[host_id] = device[block_id]
        for host_id, block_id in to_device:
            device[block_id] = host[host_id]
        for block_id, expected in enumerate(device):
            assert torch.equal(cache[:, block_id].view(torch.uint8), expected.view(torch.uint8))


def test_measuring_leaves_the_cache_as_it_was():
    cache = make_cache(torch.float32)
    before = cache.clone()
    assert make_host_cache(cache).seconds_per_block() > 0
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    ("num_bytes", "complaint"), [(100, "holds no block: one of 16 tokens takes"), (1 << 60, "more than the .* bytes")]
)
def test_memory_that_makes_no_sense_is_refused(num_bytes: int, complaint: str):
    with pytest.raises(UserError, match=f"--host-kv-memory .*{complaint}"):
        HostCache(make_cache(torch.float32), num_bytes)
