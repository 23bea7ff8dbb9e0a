"""Copies between the cache and memory of the host, against lists."""

import gc
import random
import time

import pytest
import torch
from torch import Tensor

from engine import host_cache
from engine.errors import UserError
from engine.host_cache import HostCache, PinnedSlabs
from engine.layers.host_memory import HostMemory

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_staged", [1, 7, 128])
@pytest.mark.parametrize("seed", range(2))
def test_steps_and_copies_keep_their_order_however_late_a_stream_is(num_staged: int, seed: int, monkeypatch):
    """Blocks are filled with numbers by steps that come late, into what was just evicted."""
    num_blocks, num_host_blocks, num_steps, chance = 96, 64, 100, random.Random(seed)
    cache = torch.zeros(16, num_blocks, 8, 16, 128, dtype=torch.int16, device="cuda")
    block_bytes = cache[:, 0].nbytes
    monkeypatch.setattr(host_cache, "STAGING_BYTES", num_staged * block_bytes)
    copies = HostCache(cache, num_host_blocks * block_bytes)
    device, host = [0] * num_blocks, [0] * num_host_blocks
    is_wrong = torch.zeros(num_steps, dtype=torch.bool, device="cuda")

    def upload(values: list[int]) -> Tensor:
        return torch.tensor(values).pin_memory().to("cuda", non_blocking=True)  # waits for nothing

    for step in range(num_steps):
        num_out, num_in = chance.choice([0, 1, 3, 40]), chance.choice([0, 0, 2, 30])
        evicted = chance.sample(range(num_blocks), num_out)
        to_host = list(zip(evicted, chance.sample(range(num_host_blocks), num_out), strict=True))
        targets = chance.sample(range(num_blocks), num_in)
        to_device = list(zip(chance.sample(range(num_host_blocks), num_in), targets, strict=True))
        copies.copy(to_host, to_device)
        for block_id, host_id in to_host:
            host[host_id] = device[block_id]
        expected, is_known = upload(device), upload([block_id not in targets for block_id in range(num_blocks)])
        differs = (cache.flatten(2) != expected[None, :, None]).any(2).any(0) & is_known  # the others are on their way
        is_wrong[step] = differs.any()
        torch.cuda._sleep(chance.choice([0, 0, 1_000_000, 3_000_000]))
        for block_id in set(evicted) - set(targets):
            device[block_id] = step
            cache[:, block_id] = step
        for host_id, block_id in to_device:
            device[block_id] = host[host_id]
        with torch.cuda.stream(copies._stream):
            torch.cuda._sleep(chance.choice([0, 0, 1_000_000]))
    assert not is_wrong.any()


@pytest.mark.parametrize("entry_words", [512 * 4, 512 * 3, 24, 1000])
def test_slabs_end_where_blocks_and_pages_do_and_all_are_pinned_once(entry_words: int, monkeypatch):
    monkeypatch.setattr(host_cache, "SLAB_BYTES", 40_000)
    memory = HostMemory().empty((1000, entry_words), torch.int64)
    assert memory.data_ptr() % 4096 == 0
    pinned: dict[int, int] = {}
    monkeypatch.setattr(host_cache, "pin", lambda slab: pinned.update({slab.data_ptr(): slab.nbytes}))
    monkeypatch.setattr(host_cache, "unpin", pinned.pop)
    slabs = PinnedSlabs(memory)
    assert 0 < slabs.num_first < 1000
    assert not slabs.is_whole
    slabs.pin_the_rest()
    while not slabs.is_whole:
        time.sleep(0.001)
    ends = [start + size for start, size in pinned.items()]
    assert list(pinned) == [memory.data_ptr(), *ends[:-1]]
    assert ends[-1] == memory.data_ptr() + memory.nbytes
    assert all(start % 4096 == 0 and (start - memory.data_ptr()) % memory[0].nbytes == 0 for start in pinned)
    del slabs
    gc.collect()
    assert not pinned


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
