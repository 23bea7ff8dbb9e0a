"""What a device reaches when it does one thing only: reads, copies, multiplies matrices. Measured, not looked up."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

REPLAYS = 9
GPU_BYTES = 4 << 30  # more than any cache holds
GPU_SIZE, CPU_SIZE = 8192, 2048  # of a side of the matrices
CPU_REPEATS = 10
Call = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    read_bytes_per_s: float
    copied_bytes_per_s: float  # read and written ones together
    flops_per_s: float

    def bytes_s(self, read: float, written: float) -> float:
        """What is written moves with as much of what is read at the speed of a copy, the rest at that of reading."""
        copied = min(read, written)
        return 2 * copied / self.copied_bytes_per_s + (read + written - 2 * copied) / self.read_bytes_per_s


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, num_bytes: int = GPU_BYTES) -> Ceilings:
    """Of a GPU, or of this machine's CPU with torch's threads: reading and copying about `num_bytes`, and products of
    large matrices of `dtype`. Takes the memory of twice the bytes."""
    is_gpu = device.type == "cuda"
    size, seconds = (GPU_SIZE, _gpu_seconds) if is_gpu else (CPU_SIZE, _cpu_seconds)
    source = torch.randn(1 << 20, device=device).repeat(max(1, num_bytes >> 22))
    num_bytes = source.nbytes
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    target = torch.empty_like(source)
    read_s, copy_s = seconds(source.sum), seconds(partial(target.copy_, source))
    return Ceilings(num_bytes / read_s, 2 * num_bytes / copy_s, 2 * size**3 / seconds(partial(torch.mm, a, b)))


def median_us(call: Call) -> float:
    """What the GPU takes for one call."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) * 1e3


def _gpu_seconds(call: Call) -> float:
    return median_us(call) / 1e6


def _cpu_seconds(call: Call) -> float:
    """The fastest of a few: what else runs on the machine can only add to it."""

    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(1 + CPU_REPEATS))
