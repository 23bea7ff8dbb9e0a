"""Which blocks are copied to memory of the host, and which come back.

The host has a pool of blocks, too, known by the same hashes. What a block of the device remembers goes there when
somebody else takes the block; what the next waiting request finds there comes back, into blocks that are then free but
remembered. So a request that was preempted and a prompt that begins like an earlier one are the same thing, and nobody
else need know of the host.

What always holds: what goes to the host is read behind all steps before this one, and ahead of this one and of what
comes back. What comes back is there ahead of the next step, in blocks that this step does not touch.
"""

from engine.block_pool import BlockPool, PrefixHashes

Copies = list[tuple[int, int]]  # from a block of one pool to a block of the other


class HostTier:
    """Owns the host's pool, and plans the copies that go with each step."""

    def __init__(self, pool: BlockPool, num_blocks: int, min_paged_in: int) -> None:
        """pool: the device's. min_paged_in: fewer blocks are sooner computed again than waited for."""
        self.pool = pool
        self.host_pool = BlockPool(num_blocks, pool.block_size)
        self.min_paged_in = min_paged_in
        self._paged_in: Copies = []
        self._evicted: list[tuple[int, bytes, bytes]] = []
        pool.on_evict = lambda *evicted: self._evicted.append(evicted)

    def bring_back(self, prefix: PrefixHashes, longest: int, most: int) -> bool:
        """Have up to `most` blocks of a prefix copied back, as far as it is known without a gap; False if few are.

        longest: blocks of it that are of use. There is room for all of them, and this step takes no blocks any more.
        """
        known, missing = [], []  # blocks of the device; places in the prefix, and blocks of the host
        for index, block_hash in enumerate(prefix.hashes[:longest]):
            if (block_id := self.pool.block_of(block_hash)) is not None:
                known.append(block_id)
            elif (host_id := self.host_pool.block_of(block_hash)) is not None:
                missing.append((index, host_id))
            else:
                break
        if not missing or len(missing) < self.min_paged_in:
            return False
        missing = missing[:most]
        self.pool.share(known)  # so that none of them is taken for the missing ones
        taken = self.pool.allocate(len(missing))
        for block_id, (index, host_id) in zip(taken, missing, strict=True):
            self.pool.remember(block_id, prefix, index)
            self._paged_in.append((host_id, block_id))
        self.pool.free(known + taken)
        self.host_pool.share([host_id for _, host_id in missing])  # until the step's copies are planned
        return True

    def plan(self) -> tuple[Copies, Copies]:
        """The copies that go with this step, to the host and to the device. It takes no blocks any more."""
        paged_out = []
        for block_id, block_hash, hash_before in self._evicted:
            if self.host_pool.num_free and self.host_pool.block_of(block_hash) is None:
                (host_id,) = self.host_pool.allocate(1)
                self.host_pool.remember_hash(host_id, block_hash, hash_before)
                paged_out.append((block_id, host_id))
        paged_in, self._paged_in, self._evicted = self._paged_in, [], []
        self.host_pool.free([host_id for _, host_id in reversed(paged_out)])  # to be forgotten in the same order
        self.host_pool.free([host_id for host_id, _ in paged_in])  # used just now: they stay the longest
        return paged_out, paged_in

    def check(self) -> None:
        """Assert every invariant."""
        self.host_pool.check()
        assert self.host_pool.num_free == self.host_pool.num_blocks, "a block of the host has an owner between steps"
