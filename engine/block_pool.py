"""Who owns which block of the KV cache.

A block is owned, free, or free but remembered: a full block that is freed keeps its hash until somebody needs the
memory, so that a later request with the same prefix takes it back. Invariants: a block is in `_free` exactly when its
ref_count is zero, and `_block_of_hash` and `_hash_of_block` are each other's inverse.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

BLOCK_STATES = ("free", "remembered", "owned", "shared")  # shared: owned by several requests


class BlockPool:
    """Hands out blocks, counts their owners, and finds full blocks again by the hash of their whole prefix."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # An ordered set: the block freed longest ago comes first. (A dict would look for it behind all that left it.)
        self._free = OrderedDict.fromkeys(range(num_blocks))
        self._ref_counts = [0] * num_blocks
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_before: dict[bytes, bytes] = {}  # by the same hashes, that of the prefix without the block
        # Called with a block that is taken, the hash that it forgets, and the hash before that one.
        self.on_evict: Callable[[int, bytes, bytes], None] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_remembered(self) -> int:
        return len(self._hash_of_block)

    def num_free_of(self, block_ids: Iterable[int]) -> int:
        """How many of some blocks are free."""
        counts = self._ref_counts
        return [counts[block_id] for block_id in block_ids].count(0)

    def states(self, most: int) -> tuple[bytes, int]:
        """The states of up to `most` blocks, as indices of BLOCK_STATES, and the stride by which they were picked."""
        stride = -(-self.num_blocks // most)
        counts, hashes = self._ref_counts, self._hash_of_block
        looked_at = range(0, self.num_blocks, stride)
        return bytes(min(1 + counts[i], 3) if counts[i] else int(i in hashes) for i in looked_at), stride

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for a new owner, the longest unused first; what they remembered is forgotten."""
        assert num_blocks <= len(self._free), f"{num_blocks} blocks wanted, {len(self._free)} free"
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            if (block_hash := self._hash_of_block.get(block_id)) is not None:
                hash_before = self._forget(block_hash)
                if self.on_evict is not None:
                    self.on_evict(block_id, block_hash, hash_before)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, prefix: PrefixHashes, token_ids: array[int], most: int) -> list[int]:
        """The blocks that hold the longest known prefix, of up to `most` blocks, without taking them."""
        if not prefix.hashes and (found := self._recall(prefix, token_ids, most)):
            return found
        prefix.extend(token_ids)
        found = []
        for block_hash in prefix.hashes[:most]:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def _recall(self, prefix: PrefixHashes, token_ids: array[int], most: int) -> list[int]:
        """The blocks of the longest known prefix, whose hashes are filled in, few of them worked out: its end is looked
        for in ever smaller steps, and a known block tells the hash of the one before. No blocks if one before the end
        is not known: who waits for room, and is looked for in every step, is not hashed anew in each.
        """
        words, num_blocks, hasher, last = prefix.bytes_of(token_ids), 0, prefix.hasher, prefix.seed
        step = 1 << most.bit_length()
        while step := step // 2:
            if num_blocks + step > most:
                continue
            ahead = hasher.copy()
            ahead.update(words[num_blocks * prefix.block_bytes : (num_blocks + step) * prefix.block_bytes])
            if (block_hash := ahead.digest()) in self._block_of_hash:
                num_blocks, hasher, last = num_blocks + step, ahead, block_hash
        found, hashes = [], []
        block_of_hash, hash_before, seed = self._block_of_hash, self._hash_before, prefix.seed
        while last != seed:
            if last not in block_of_hash:
                return []
            found.append(block_of_hash[last])
            hashes.append(last)
            last = hash_before[last]
        prefix.hashes, prefix.hasher = hashes[::-1], hasher
        return found[::-1]

    def share(self, block_ids: Iterable[int]) -> None:
        """Add an owner to blocks found in the prefix cache."""
        counts, free = self._ref_counts, self._free
        for block_id in block_ids:
            if counts[block_id] == 0:
                del free[block_id]
            counts[block_id] += 1

    def remember(self, block_id: int, prefix: PrefixHashes, index: int) -> None:
        """Make block `index` of a sequence findable. Of two blocks with equal content the first stays the known one."""
        self.remember_hash(block_id, prefix.hashes[index], prefix.hashes[index - 1] if index else prefix.seed)

    def remember_hash(self, block_id: int, block_hash: bytes, hash_before: bytes) -> None:
        """The same of a block by the hash of the prefix that it ends, and of the prefix without it."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} has no owner"
        if block_hash not in self._block_of_hash:
            self._block_of_hash[block_hash] = block_id
            self._hash_of_block[block_id] = block_hash
            self._hash_before[block_hash] = hash_before

    def block_of(self, block_hash: bytes) -> int | None:
        """The block that is known to hold the end of the prefix of this hash."""
        return self._block_of_hash.get(block_hash)

    def forget(self, prefix: PrefixHashes) -> None:
        """Let nobody find the blocks of a sequence any more: what they hold is not to be used again."""
        for block_hash in prefix.hashes:
            if block_hash in self._block_of_hash:
                self._forget(block_hash)

    def _forget(self, block_hash: bytes) -> bytes:
        """The hash before it was."""
        del self._hash_of_block[self._block_of_hash.pop(block_hash)]
        return self._hash_before.pop(block_hash)

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop an owner. Later blocks are freed first, so that eviction shortens a prefix from its end."""
        counts, free = self._ref_counts, self._free
        for block_id in reversed(block_ids):
            count = counts[block_id] = counts[block_id] - 1
            if count <= 0:
                assert count == 0, f"block {block_id} freed twice"
                free[block_id] = None

    def check(self) -> None:
        """Assert every invariant."""
        for block_id, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block_id} has {count} owners"
            assert (count == 0) == (block_id in self._free), f"block {block_id} has {count} owners"
        assert {h: b for b, h in self._hash_of_block.items()} == self._block_of_hash
        assert len(self._hash_of_block) == len(self._block_of_hash)
        assert self._hash_before.keys() == self._block_of_hash.keys()


class PrefixHashes:
    """Of each full block of a sequence, a hash of all tokens up to its end: sha256, salted.

    Prefixes under different salts never meet.
    """

    def __init__(self, salt: str, block_size: int) -> None:
        self.seed = hashlib.sha256(salt.encode()).digest()  # stands before the first block's hash
        self.block_size = block_size
        self.block_bytes = block_size * array("i").itemsize
        self.hashes: list[bytes] = []  # as far as they are worked out
        self.hasher = hashlib.sha256(self.seed)  # has seen the tokens of that many blocks

    def extend(self, token_ids: array[int]) -> None:
        """Append the hashes of the full blocks of token_ids that are not there yet."""
        words, first = self.bytes_of(token_ids), len(self.hashes)
        for i in range(first, len(token_ids) // self.block_size):
            self.hasher.update(words[i * self.block_bytes : (i + 1) * self.block_bytes])
            self.hashes.append(self.hasher.copy().digest())

    @staticmethod
    def bytes_of(token_ids: array[int]) -> memoryview:
        return memoryview(token_ids).cast("B")
