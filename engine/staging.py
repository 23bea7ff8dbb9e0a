"""Buffers between files and a device: read into one, copy from it to a tensor's place, take the next.

Where the device is a GPU, its copy engine reads a buffer while the host fills others. What always holds: a buffer is
lent to one reader at a time, and only when the copies out of it have ended.
"""

import contextlib
from collections.abc import Iterator
from queue import SimpleQueue

import torch
from torch import Tensor

from engine.layers.host_memory import HostMemory, pin, unpin

# On an H200's host eight threads bring 22 GB/s to the GPU by buffers of 2 MiB, 51 by 8 and 33 by 32; with a buffer
# each instead of two, 39.
BUFFER_BYTES = 8 << 20
NUM_BUFFERS = 16


class Staging:
    """A ring of buffers in memory of the host, pinned for a GPU. Any thread may borrow."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES, num_buffers: int = NUM_BUFFERS) -> None:
        self.buffer_bytes = buffer_bytes
        self._memory = HostMemory().empty((num_buffers, buffer_bytes), torch.uint8)
        self._is_pinned = device.type == "cuda"
        if self._is_pinned:
            pin(self._memory)
        self._streams = [torch.cuda.Stream(device) if self._is_pinned else None for _ in range(num_buffers)]
        self._ring: SimpleQueue[tuple[Tensor, torch.cuda.Stream | None]] = SimpleQueue()
        for lane in zip(self._memory, self._streams, strict=True):
            self._ring.put(lane)

    def now(self) -> torch.cuda.Event | None:
        """The moment at which what the caller has asked of its GPU so far is done."""
        return torch.cuda.current_stream().record_event() if self._is_pinned else None

    @contextlib.contextmanager
    def buffer(self, after: torch.cuda.Event | None) -> Iterator[Tensor]:
        """A buffer, [buffer_bytes] uint8. Copies from it that the block starts wait for `after`, and may outlast it."""
        buffer, stream = self._ring.get()
        try:
            if stream is not None:
                stream.synchronize()
            with torch.cuda.stream(stream):
                if stream is not None and after is not None:
                    stream.wait_event(after)
                yield buffer
        finally:
            self._ring.put((buffer, stream))

    def close(self) -> None:
        """Wait for the last copies and give the memory back. Nobody borrows any more."""
        for stream in self._streams:
            if stream is not None:
                stream.synchronize()
        if self._is_pinned:
            unpin(self._memory.data_ptr())
