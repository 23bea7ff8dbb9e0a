"""Steps as CUDA graphs: one launch for a whole step instead of one for each of its kernels.

A graph replays fixed kernels on fixed addresses, so there is one for each of some sizes; a step takes the smallest that
holds it and the rest is padding. All graphs share one pool of memory: only one runs at a time. A few sizes are captured
at the start, so that it is short, and the others while the engine serves: until then steps have more padding.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALWAYS = 2048  # tokens of a mixed step that have a graph on every GPU
PACE = 1024  # tokens of the smaller one of the two by which the pace of such steps is told
COMMON = [4**n for n in range(7)]  # sizes that have a graph from the start; the largest has one, too
BUSY = 0.7  # share of a step's time in which all of its kernels have been launched, where no graph is needed


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: small ones exactly, larger ones so that padding stays below a quarter."""
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_num_seqs, 32), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def mixed_sizes(max_num_tokens: int, run: Callable[[int], None]) -> list[int]:
    """Tokens of a step with prefill chunks worth a graph, whatever fills it up: as long as the host takes longer to
    launch its kernels one by one than the GPU to run them. `run` launches a step of a size.

    Up to ALWAYS in any case: cuBLAS takes long to choose a kernel for a number of rows that it has not seen, and crowds
    come to ever new ones. The rows of its tiles are multiples of 64 or 128 anyway.
    """
    sizes = {16, 32, 64, 96, 128, *range(192, 512, 64), *range(512, ALWAYS, 128), *range(ALWAYS, 4097, 512)}
    if max_num_tokens > ALWAYS and _keeps_gpu_busy(partial(run, ALWAYS)):
        max_num_tokens = ALWAYS
    return sorted(size for size in sizes if size <= max_num_tokens)


def _keeps_gpu_busy(launch: Callable[[], None]) -> bool:
    """Whether the host is done with its launches well before the GPU is."""
    launch()
    torch.cuda.synchronize()
    start = time.perf_counter()
    launch()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return launched - start < BUSY * (time.perf_counter() - start)


class Graphs:
    """Captured runs of one function, on inputs of some sizes."""

    def __init__(
        self,
        body: Callable[[Tensor, int], Any],
        idle_inputs: Callable[[int], np.ndarray],
        sizes: list[int],
        device: torch.device,
        shared: Graphs | None = None,
        full_size: int | None = None,
    ) -> None:
        """body: from inputs (int32) and their size to results, made of device work alone, its shapes set by the size.

        idle_inputs: inputs of a size that do nothing. shared: other graphs to share memory with. full_size: one more
        size, too large for padding: the graph is for steps that fill it.
        """
        self._body, self._idle_inputs, self._device = body, idle_inputs, device
        self._pool: Any = shared._pool if shared else None
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self.num_bytes = 0  # that the graphs take
        self.sizes: list[int] = []  # that have a graph
        self.full_size = full_size if full_size not in sizes else None
        self.waiting = [size for size in sizes if size not in COMMON and size != sizes[-1]]  # for theirs
        self.waiting += [self.full_size] if self.full_size else []
        self.wanted: int | None = None  # the one of those that would have fitted best, last time
        # What is set up at the first call (handles, workspaces) cannot be captured.
        body(torch.from_numpy(idle_inputs(sizes[-1])).to(device), sizes[-1])
        for size in reversed(sizes):  # the largest first: the others find its memory in the pool
            if size not in self.waiting:
                self._add(size)

    def fit(self, num: int) -> int | None:
        """The smallest size with a graph that holds `num`, if there is one. A better one that waits is wanted now."""
        large_enough = self.sizes[bisect_left(self.sizes, num) :]
        size = next((size for size in large_enough if size != self.full_size or size == num), None)
        better = (waiting for waiting in self.waiting if num <= waiting < (size or num + 1))
        self.wanted = min(better, default=self.wanted)
        return size

    def capture_next(self) -> bool:
        """Capture a size that waits, a wanted one first; False if none does. Between steps, which may be in flight."""
        if not self.waiting:
            return False
        size, self.wanted = self.wanted or self.waiting[0], None
        self.waiting.remove(size)
        try:
            self._add(size)
        except RuntimeError as error:  # no memory, say: padding costs less than an engine
            logging.getLogger("vcli").warning("%d CUDA graphs are left out: %s", 1 + len(self.waiting), error)
            self.waiting.clear()
        return True

    def _add(self, size: int) -> None:
        self._capture(size)
        insort(self.sizes, size)

    def _capture(self, size: int) -> None:
        """Record a run of body, and run nothing: the results of a step in flight stay where they are."""
        torch.cuda.empty_cache()  # torch.cuda.graph does so, too; what that frees is not to be counted
        free, _ = torch.cuda.mem_get_info(self._device)
        inputs = torch.from_numpy(self._idle_inputs(size)).to(self._device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may pin memory of the host meanwhile, which would spoil a global capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = self._body(inputs, size)
        self._pool = graph.pool()
        self._inputs[size], self._graphs[size] = inputs, (graph, results)
        self.num_bytes += free - torch.cuda.mem_get_info(self._device)[0]

    def pace(self) -> tuple[float, float]:
        """Seconds that a large step takes, whatever is in it, and seconds for each of its tokens beyond that.

        The line through what two graphs take; where there is but one, all is the tokens'.
        """
        small, large = self.fit(PACE) or self.sizes[-1], self.sizes[-1]
        small_s = self.seconds(small)
        if large < 2 * small:
            return 0.0, small_s / small
        per_token_s = (self.seconds(large) - small_s) / (large - small)
        return max(small_s - small * per_token_s, 0.0), per_token_s

    def seconds(self, size: int) -> float:
        """How long the graph of a size takes, at its best: the first times find a GPU that is still waking up."""

        def once() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._graphs[size][0].replay()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        return min(once() for _ in range(5))

    def run(self, inputs: np.ndarray, size: int) -> Any:
        """body's results. Valid until the next run of any graph, on the same stream."""
        self._inputs[size].copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        graph, results = self._graphs[size]
        graph.replay()
        return results
