import random
import time

import pytest

from engine.block_pool import BlockPool, extend_block_hashes, hash_seed


def hashes_of(tokens: list[int], salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, hash_seed(salt), tokens, block_size=4)
    return hashes


def test_freed_prefix_is_found_again():
    pool = BlockPool(num_blocks=4, block_size=4)
    hashes = hashes_of(list(range(10)))
    blocks = pool.allocate(3)
    for block, block_hash in zip(blocks, hashes, strict=False):
        pool.remember(block, block_hash)
    pool.free(blocks)
    assert pool.find(hashes) == blocks[:2]
    pool.share(blocks[:2])
    assert pool.num_free == 2
    pool.check()


def test_the_block_freed_longest_ago_is_evicted_first_and_forgotten():
    pool = BlockPool(num_blocks=2, block_size=4)
    first, second = pool.allocate(2)
    old, new = hashes_of([1, 2, 3, 4])[0], hashes_of([5, 6, 7, 8])[0]
    pool.remember(first, old)
    pool.remember(second, new)
    pool.free([first])
    pool.free([second])
    assert pool.allocate(1) == [first]
    assert pool.find([old]) == []
    assert pool.find([new]) == [second]
    pool.check()


def test_a_prefix_is_evicted_from_its_end():
    pool = BlockPool(num_blocks=3, block_size=4)
    hashes = hashes_of(list(range(12)))
    blocks = pool.allocate(3)
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.remember(block, block_hash)
    pool.free(blocks)
    pool.allocate(1)
    assert pool.find(hashes) == blocks[:2]


def test_hashes_depend_on_the_whole_prefix_and_the_salt():
    assert hashes_of([1, 2, 3, 4, 5, 6, 7, 8])[1] != hashes_of([0, 2, 3, 4, 5, 6, 7, 8])[1]
    assert hashes_of([1, 2, 3, 4])[0] != hashes_of([1, 2, 3, 4], salt="tenant")[0]
    assert hashes_of([1, 2, 3, 4])[0] == hashes_of([1, 2, 3, 4, 5])[0]


def test_a_block_freed_twice_is_noticed():
    pool = BlockPool(num_blocks=2, block_size=4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_agrees_with_a_brute_force_pool(seed: int):
    """The oracle keeps a list of owners a block and the time it was freed; eviction takes the oldest."""
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=12, block_size=4)
    owners: dict[int, int] = dict.fromkeys(range(12), 0)
    content: dict[int, bytes] = {}
    freed_at: dict[int, int] = {block: block - 100 for block in range(12)}
    held: list[list[int]] = []
    for clock in range(1000):
        free = sorted((b for b in owners if owners[b] == 0), key=lambda b: freed_at[b])
        action = rng.choice(["allocate", "free", "remember", "share"])
        if action == "allocate":
            wanted = rng.randint(0, len(free))
            assert pool.allocate(wanted) == free[:wanted]
            for block in free[:wanted]:
                owners[block] = 1
                content.pop(block, None)
            held.append(free[:wanted])
        elif action == "free" and held:
            blocks = held.pop(rng.randrange(len(held)))
            pool.free(blocks)
            for age, block in enumerate(reversed(blocks)):
                owners[block] -= 1
                freed_at[block] = clock * 100 + age
        elif action == "remember" and any(held):
            block = rng.choice([b for blocks in held for b in blocks])
            block_hash = bytes([rng.randrange(6)])
            if block not in content and block_hash not in content.values():
                content[block] = block_hash
                pool.remember(block, block_hash)
        elif action == "share":
            wanted = bytes([rng.randrange(6)])
            expected = [b for b, h in content.items() if h == wanted]
            assert pool.find([wanted]) == expected
            pool.share(expected)
            for block in expected:
                owners[block] += 1
            held.append(expected)
        assert pool.num_free == sum(count == 0 for count in owners.values())
        pool.check()


def test_blocks_come_as_quickly_from_a_pool_that_has_given_away_most_of_its_blocks():
    pool = BlockPool(1 << 17, 16)

    def seconds() -> float:
        start = time.perf_counter()
        pool.allocate(64)
        return time.perf_counter() - start

    fresh = min(seconds() for _ in range(5))
    pool.allocate(pool.num_free - 1024)
    assert min(seconds() for _ in range(5)) < 20 * fresh
