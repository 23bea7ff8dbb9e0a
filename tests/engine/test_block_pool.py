import random
import time
from array import array

import pytest

from engine.block_pool import BLOCK_STATES, BlockPool, PrefixHashes


def hashed(tokens: list[int], salt: str = "") -> PrefixHashes:
    prefix = PrefixHashes(salt, block_size=4)
    prefix.extend(array("i", tokens))
    return prefix


def find(pool: BlockPool, tokens: list[int]) -> list[int]:
    """By a request that has worked out no hash yet."""
    return pool.find(PrefixHashes("", block_size=4), array("i", tokens), len(tokens) // 4)


def remember(pool: BlockPool, blocks: list[int], tokens: list[int]) -> None:
    for index, block in enumerate(blocks[: len(tokens) // 4]):
        pool.remember(block, hashed(tokens), index)


def test_freed_prefix_is_found_again():
    pool = BlockPool(num_blocks=4, block_size=4)
    tokens = list(range(10))
    blocks = pool.allocate(3)
    remember(pool, blocks, tokens)
    pool.free(blocks)
    assert find(pool, tokens) == blocks[:2]
    assert pool.find(hashed(tokens), array("i", tokens), 1) == blocks[:1]
    pool.share(blocks[:2])
    assert pool.num_free == 2
    pool.check()


def test_blocks_show_whether_they_are_owned_shared_or_remembered():
    def shown(most: int) -> list[str]:
        return [BLOCK_STATES[state] for state in pool.states(most)[0]]

    pool = BlockPool(num_blocks=6, block_size=4)
    blocks = pool.allocate(4)
    remember(pool, blocks, list(range(16)))
    pool.free(blocks[1:3])
    pool.share(blocks[:1])
    assert shown(6) == ["shared", "remembered", "remembered", "owned", "free", "free"]
    assert shown(3) == ["shared", "remembered", "free"], "every second one"
    assert [pool.states(most)[1] for most in (100, 6, 5, 1)] == [1, 1, 2, 6]


def test_the_block_freed_longest_ago_is_evicted_first_and_forgotten():
    pool = BlockPool(num_blocks=2, block_size=4)
    first, second = pool.allocate(2)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    remember(pool, [first], old)
    remember(pool, [second], new)
    pool.free([first])
    pool.free([second])
    assert pool.allocate(1) == [first]
    assert find(pool, old) == []
    assert find(pool, new) == [second]
    pool.check()


def test_a_prefix_is_evicted_from_its_end():
    pool = BlockPool(num_blocks=3, block_size=4)
    tokens = list(range(12))
    blocks = pool.allocate(3)
    remember(pool, blocks, tokens)
    pool.free(blocks)
    pool.allocate(1)
    assert find(pool, tokens) == blocks[:2]


@pytest.mark.parametrize("num_known", range(24))
def test_the_end_of_the_known_prefix_is_found_wherever_it_is(num_known: int):
    pool = BlockPool(num_blocks=32, block_size=4)
    tokens = list(range(100))
    blocks = pool.allocate(32)[:num_known]
    remember(pool, blocks, tokens)
    for most in (23, num_known, num_known // 2):
        prefix = PrefixHashes("", block_size=4)
        assert pool.find(prefix, array("i", tokens), most) == blocks[:most]
        prefix.extend(array("i", tokens))
        assert prefix.hashes == hashed(tokens).hashes


def test_blocks_behind_a_forgotten_one_are_not_found():
    pool = BlockPool(num_blocks=8, block_size=4)
    tokens = list(range(32))
    blocks = pool.allocate(8)
    remember(pool, blocks, tokens)
    pool.free(blocks[2:3])
    assert pool.allocate(1) == blocks[2:3]
    assert find(pool, tokens) == blocks[:2]
    pool.check()


def test_an_unknown_prompt_is_hashed_once_however_often_it_is_looked_for():
    pool, tokens = BlockPool(num_blocks=8, block_size=4), list(range(32))
    prefix = PrefixHashes("", block_size=4)
    assert pool.find(prefix, array("i", tokens), 7) == []
    assert prefix.hashes == hashed(tokens).hashes
    blocks = pool.allocate(3)
    remember(pool, blocks, tokens)  # meanwhile
    assert pool.find(prefix, array("i", tokens), 7) == blocks


def test_hashes_depend_on_the_whole_prefix_and_the_salt():
    assert hashed([1, 2, 3, 4, 5, 6, 7, 8]).hashes[1] != hashed([0, 2, 3, 4, 5, 6, 7, 8]).hashes[1]
    assert hashed([1, 2, 3, 4]).hashes[0] != hashed([1, 2, 3, 4], salt="tenant").hashes[0]
    assert hashed([1, 2, 3, 4]).hashes[0] == hashed([1, 2, 3, 4, 5]).hashes[0]


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
    content: dict[int, int] = {}  # of the known blocks: each the first of one of six prompts
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
            prompt = rng.randrange(6)
            if block not in content and prompt not in content.values():
                content[block] = prompt
                remember(pool, [block], [prompt] * 4)
        elif action == "share":
            wanted = rng.randrange(6)
            expected = [b for b, prompt in content.items() if prompt == wanted]
            assert find(pool, [wanted] * 4) == expected
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
