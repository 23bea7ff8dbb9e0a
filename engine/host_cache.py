"""Blocks in memory of the host, and their copies to and from the device's cache.

A block is one piece there, and on the device a part in each layer's keys and values: between the two lies a buffer on
the device, in which parts are put together, at the speed of its memory. What goes over the bus does so on a stream of
its own, beside the steps. `copy` says what waits for what.
"""

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from engine.config import BLOCK_SIZE
from engine.errors import UserError
from engine.host_tier import Copies
from engine.layers.host_memory import HostMemory, pin, unpin

STAGING_BYTES = 256 << 20  # blocks that a chunk of 2048 tokens takes from others, of an 8B model
SLAB_BYTES = 64 << 20  # pinned at a time: launches wait for it up to 4 ms on an H200's host, 7 ms for 256 MiB
PAGE_BYTES = 4096


class HostCache:
    """Owns the host's blocks, [num_blocks, num_parts * words of a part], and the stream of the copies."""

    def __init__(self, cache: Tensor, num_bytes: int) -> None:
        """cache: of all layers, [num_parts, num_device_blocks, num_kv_heads, BLOCK_SIZE, head_dim].

        Raises UserError if num_bytes are not there, or hold no block.
        """
        num_parts, num_device_blocks = cache.shape[:2]
        self._parts = cache.view(num_parts * num_device_blocks, -1).view(torch.int64)  # a line is a block's in a layer
        words = self._parts.shape[1]
        self.block_bytes = num_parts * words * self._parts.itemsize
        self.num_blocks = num_bytes // self.block_bytes
        if self.num_blocks < 1:
            raise UserError(
                f"--host-kv-memory {num_bytes:,} holds no block: one of {BLOCK_SIZE} tokens takes {self.block_bytes:,} "
                "bytes"
            )
        if num_bytes > (available := psutil.virtual_memory().available):
            raise UserError(f"--host-kv-memory {num_bytes:,} is more than the {available:,} bytes that are free")
        self._blocks = HostMemory().empty((self.num_blocks, num_parts, words), torch.int64)
        self._first_lines = torch.arange(num_parts) * num_device_blocks
        num_staged = min(max(STAGING_BYTES // self.block_bytes, 1), self.num_blocks, num_device_blocks)
        self._staging = torch.empty(num_staged, num_parts, words, dtype=torch.int64, device=cache.device)
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None  # the end of the copies that the next step waits for
        self._pinned: PinnedSlabs | None = None
        if cache.is_cuda:
            self._stream = torch.cuda.Stream(cache.device)
            self._pinned = PinnedSlabs(self._blocks)

    def prepare(self) -> None:
        """Pin the memory, which takes seconds, on a thread of its own; `is_ready` tells when it is done."""
        if self._pinned is not None:
            self._pinned.pin_the_rest()

    @property
    def is_ready(self) -> bool:
        return self._pinned is None or self._pinned.is_whole

    def copy(self, to_host: Copies, to_device: Copies) -> None:
        """Begin the copies that go with the next step: first those to the host, then those to the device.

        Blocks of the device are read behind all that it was asked to do so far, and ahead of what it is asked to do
        next. They are written beside the next step, and ahead of what it is asked to do from the second call on.
        """
        self._await_copies()
        for some in self._split(to_host):
            self._to_host(some)
        for some in self._split(to_device):
            self._to_device(some)

    def seconds_per_block(self) -> float:
        """How long a block takes to the host and back, beside nothing else; before any block is in use."""
        num_pinned = self.num_blocks if self._pinned is None else self._pinned.num_first
        copies = [(i, i) for i in range(min(len(self._staging), num_pinned))]
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.copy(copies, [])
            self.copy([], copies)
            if self._stream is not None:
                self._stream.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds) / len(copies)

    def _split(self, copies: Copies) -> list[Copies]:
        """As many at a time as the buffer between host and cache holds."""
        num = len(self._staging)
        return [copies[first : first + num] for first in range(0, len(copies), num)]

    def _to_host(self, copies: Copies) -> None:
        self._await_copies()  # out of the buffer
        lines = self._lines([block_id for block_id, _ in copies])
        torch.index_select(self._parts, 0, lines, out=self._staging[: len(copies)].flatten(0, 1))
        with self._beside():
            for staged, (_, host_id) in zip(self._staging, copies, strict=False):
                self._blocks[host_id].copy_(staged, non_blocking=True)

    def _to_device(self, copies: Copies) -> None:
        with self._beside():
            for staged, (host_id, _) in zip(self._staging, copies, strict=False):
                staged.copy_(self._blocks[host_id], non_blocking=True)
            lines = self._lines([block_id for _, block_id in copies])
            self._parts.index_copy_(0, lines, self._staging[: len(copies)].flatten(0, 1))

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the copies, behind what the device was asked to do so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._copied = self._stream.record_event()

    def _await_copies(self) -> None:
        """What the device is asked to do from now on comes behind the copies."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def _lines(self, block_ids: list[int]) -> Tensor:
        """Where the parts of blocks lie in the cache, those of a block side by side."""
        lines = (torch.tensor(block_ids)[:, None] + self._first_lines).flatten()
        return lines if self._stream is None else lines.pin_memory().to(self._parts.device, non_blocking=True)


class PinnedSlabs:
    """Owns the pinning of large memory: of its first slab at once, of the others on a thread.

    A copy must not cross from one slab to the next, so that each ends where an entry does. They end where pages do,
    too, for a page is pinned once.
    """

    def __init__(self, memory: Tensor) -> None:
        """memory: [entries, ...], contiguous, from the beginning of a page."""
        entry_bytes = memory[0].nbytes
        step = PAGE_BYTES // math.gcd(entry_bytes, PAGE_BYTES)
        self._slabs = memory.split(-(-SLAB_BYTES // (entry_bytes * step)) * step)
        self.num_first = len(self._slabs[0])  # entries that are pinned from the start
        self.is_whole = False
        self._addresses: list[int] = []
        weakref.finalize(self, _unpin_all, self._addresses).atexit = False
        self._pin(self._slabs[0])

    def pin_the_rest(self) -> None:
        """Begin to pin the other slabs; `is_whole` tells when that is done."""
        threading.Thread(target=self._pin_all, name="pinning memory", daemon=True).start()

    def _pin_all(self) -> None:
        for slab in self._slabs[1:]:
            self._pin(slab)
        self.is_whole = True

    def _pin(self, slab: Tensor) -> None:
        # The system gives memory when it is touched, which nobody waits for; the driver lets others wait.
        slab.view(torch.uint8).view(-1)[::PAGE_BYTES].zero_()
        pin(slab)
        self._addresses.append(slab.data_ptr())


def _unpin_all(addresses: list[int]) -> None:
    for address in addresses:
        unpin(address)
