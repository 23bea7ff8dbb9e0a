"""Who owns which block of the KV cache.

A block is owned, free, or free but remembered: a full block that is freed keeps its hash until somebody needs the
memory, so that a later request with the same prefix takes it back. Invariants: a block is in `_free` exactly when its
ref_count is zero, and `_block_of_hash` and `_hash_of_block` are each other's inverse.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


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

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block_id: int) -> bool:
        return self._ref_counts[block_id] == 0

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for a new owner, the longest unused first; what they remembered is forgotten."""
        assert num_blocks <= len(self._free), f"{num_blocks} blocks wanted, {len(self._free)} free"
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            if (block_hash := self._hash_of_block.pop(block_id, None)) is not None:
                del self._block_of_hash[block_hash]
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix, without taking them."""
        found = []
        for block_hash in block_hashes:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def share(self, block_ids: Iterable[int]) -> None:
        """Add an owner to blocks found in the prefix cache."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def remember(self, block_id: int, block_hash: bytes) -> None:
        """Make a full block findable. Of two blocks with equal content the first stays the known one."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} has no owner"
        if block_hash not in self._block_of_hash:
            self._block_of_hash[block_hash] = block_id
            self._hash_of_block[block_id] = block_hash

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop an owner. Later blocks are freed first, so that eviction shortens a prefix from its end."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, f"block {block_id} freed twice"
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None

    def check(self) -> None:
        """Assert every invariant."""
        for block_id, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block_id} has {count} owners"
            assert (count == 0) == (block_id in self._free), f"block {block_id} has {count} owners"
        assert {h: b for b, h in self._hash_of_block.items()} == self._block_of_hash
        assert len(self._hash_of_block) == len(self._block_of_hash)


def hash_seed(salt: str) -> bytes:
    """The parent of a first block's hash: prefixes under different salts never meet."""
    return hashlib.sha256(salt.encode()).digest()


def extend_block_hashes(hashes: list[bytes], seed: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append the hashes of the full blocks of token_ids that `hashes` lacks: sha256(parent hash, token ids)."""
    first, last = len(hashes) * block_size, len(token_ids) // block_size * block_size
    if first >= last:
        return
    tokens = memoryview(array("q", token_ids[first:last])).cast("B")
    parent, num_bytes = hashes[-1] if hashes else seed, 8 * block_size
    for start in range(0, len(tokens), num_bytes):
        parent = hashlib.sha256(parent + tokens[start : start + num_bytes]).digest()
        hashes.append(parent)
