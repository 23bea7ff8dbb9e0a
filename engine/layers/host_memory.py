"""Memory of the host for weights and what else is large, in pages of 2 MiB where the system has them.

A CPU reads all weights in every step, and looking up pages of 4 KiB then costs up to a third of the memory's speed (27
against 38 GB/s in a virtual machine of two cores). Weights lie one behind the other: small ones share a large page.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

SLAB_BYTES = 64 << 20  # what is taken from the system at a time; it only counts once it is written to
ALIGNMENT = 64  # bytes of a cache line


class HostMemory:
    """Hands out pieces of slabs; a slab lives as long as one of its tensors."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if len(self._free) < padded:
            self._free = _slab(max(padded, SLAB_BYTES))
        piece, self._free = self._free[:size], self._free[padded:]
        return piece.view(dtype).view(shape)


def pin(memory: Tensor) -> None:
    """Have a GPU copy from and to memory by itself. By hand: torch would keep what it pins, and pins small pages."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))


def unpin(data_ptr: int) -> None:
    """Let go of memory that was pinned, by its address, before it is freed."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(data_ptr))


def _slab(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages: ordinary ones do
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
