"""Which blocks go to the host and come back, against memories made of lists."""

import random
from array import array
from itertools import takewhile

import pytest

from engine.block_pool import BlockPool, PrefixHashes
from engine.host_tier import HostTier

BLOCK = 4


def hashed(tokens: list[int]) -> PrefixHashes:
    prefix = PrefixHashes("", BLOCK)
    prefix.extend(array("i", tokens))
    return prefix


def make_tier(num_blocks: int = 8, num_host_blocks: int = 8, min_paged_in: int = 1) -> HostTier:
    return HostTier(BlockPool(num_blocks, BLOCK), num_host_blocks, min_paged_in)


def use(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks of a sequence that has run, and is gone."""
    prefix = hashed(tokens)
    blocks = pool.allocate(len(prefix.hashes))
    for index, block in enumerate(blocks):
        pool.remember(block, prefix, index)
    pool.free(blocks)
    return blocks


def test_a_block_goes_to_the_host_when_another_takes_it_and_only_once():
    tier, prefix = make_tier(num_blocks=2), hashed([1] * 8)
    blocks = use(tier.pool, [1] * 8)
    assert tier.plan() == ([], [])
    use(tier.pool, [2] * 8)
    assert [block_id for block_id, _ in tier.plan()[0]] == blocks[::-1]  # the end of a sequence goes first
    assert tier.bring_back(prefix, longest=2, most=2)
    paged_out, paged_in = tier.plan()
    assert (len(paged_out), len(paged_in)) == (2, 2)
    tier.pool.allocate(2)
    assert tier.plan() == ([], [])
    tier.check()


def test_the_host_forgets_first_what_came_first_and_what_was_used_last_of_all():
    tier = make_tier(num_blocks=2, num_host_blocks=4)
    for kind in (1, 2, 3):
        use(tier.pool, [kind] * 8)
        tier.plan()
    assert tier.bring_back(hashed([1] * 8), longest=2, most=2)  # which sends the third to where the second is
    tier.plan()
    assert tier.bring_back(hashed([3] * 8), longest=2, most=2)
    assert not tier.bring_back(hashed([2] * 8), longest=2, most=2)


def test_a_host_smaller_than_what_a_step_takes_gets_no_block_twice():
    tier = make_tier(num_blocks=40, num_host_blocks=3)
    use(tier.pool, list(range(160)))
    tier.pool.allocate(40)
    paged_out, _ = tier.plan()
    assert len({host_id for _, host_id in paged_out}) == len(paged_out) == 3


def test_a_block_on_its_way_back_is_not_overwritten_in_the_same_step():
    tier = make_tier(num_blocks=2, num_host_blocks=2)
    for kind in (1, 2):
        use(tier.pool, [kind] * 8)
        tier.plan()
    assert tier.bring_back(hashed([1] * 8), longest=2, most=2)
    paged_out, paged_in = tier.plan()
    assert (len(paged_out), len(paged_in)) == (0, 2)


def test_a_gap_ends_what_comes_back():
    tier, prefix = make_tier(num_blocks=4, num_host_blocks=3), hashed(list(range(16)))
    use(tier.pool, list(range(16)))
    tier.pool.allocate(4)
    tier.plan()
    on_host = [tier.host_pool.block_of(block_hash) is not None for block_hash in prefix.hashes]
    assert on_host == [False, True, True, True]
    tier.pool.free(range(4))
    assert not tier.bring_back(prefix, longest=4, most=4)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_keeps_what_the_pools_say(seed: int):
    """The oracle moves contents about as it is told, and looks whether each block holds what its pool believes."""
    chance = random.Random(seed)
    tier = make_tier(12, chance.choice([9, 20, 30]), min_paged_in=chance.randint(1, 2))
    pool, device, host, held = tier.pool, {}, {}, []
    prompts = [[kind] * 8 + list(range(20)) for kind in range(4)] + [list(range(20, 48))]
    num_paged_in = 0
    for _ in range(1000):
        prefix = hashed(chance.choice(prompts)[: chance.randrange(29)])
        known = [block_id for each in prefix.hashes if (block_id := pool.block_of(each)) is not None]
        num_missing = len(prefix.hashes) - len(known)
        has_room = pool.num_free - pool.num_free_of(known) >= num_missing
        expected, written = [], {}
        action = chance.choice(["run", "free", "bring back"])
        if action == "run" and has_room:
            pool.share(known)
            held.append(known + (new := pool.allocate(num_missing)))
            for index, block_hash in enumerate(prefix.hashes):
                if pool.block_of(block_hash) is None:
                    written[new[-1]] = block_hash
                    pool.remember(new.pop(), prefix, index)
        elif action == "free" and held:
            pool.free(held.pop(chance.randrange(len(held))))
        elif action == "bring back" and has_room:
            on_device = {device[block_id] for block_id in known}
            reachable = takewhile({*on_device, *host.values()}.__contains__, prefix.hashes)
            expected = [each for each in reachable if each not in on_device]
            if len(expected) < tier.min_paged_in:
                expected = []
            most = chance.randint(1, 8)
            assert tier.bring_back(prefix, len(prefix.hashes), most) == bool(expected)
            expected = expected[:most]
        paged_out, paged_in = tier.plan()
        host |= {host_id: device[block_id] for block_id, host_id in paged_out}
        assert [host[host_id] for host_id, _ in paged_in] == expected
        num_paged_in += len(paged_in)
        device |= {block_id: host[host_id] for host_id, block_id in paged_in} | written
        for blocks, contents in ((pool, device), (tier.host_pool, host)):
            assert all(contents[block_id] == each for block_id, each in blocks._hash_of_block.items())
        pool.check()
        tier.check()
    assert num_paged_in > 0
