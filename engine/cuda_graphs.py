"""Decode steps as CUDA graphs: one launch for a whole step instead of one for each of its kernels.

A graph replays fixed kernels on fixed addresses, so there is one for each of some batch sizes; a batch takes the
smallest that holds it and the rest is padding. All graphs share one pool of memory: only one runs at a time.
"""

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Body = Callable[[Tensor], tuple[Tensor, Tensor]]  # inputs [num_fields, size] int32 → results with `size` rows each


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: small ones exactly, larger ones so that padding stays below a quarter."""
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_num_seqs, 32), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


class DecodeGraphs:
    """Captured runs of one function over batches of different sizes."""

    def __init__(self, body: Body, padding: np.ndarray, sizes: list[int], device: torch.device) -> None:
        """padding [num_fields, 1] int32: the inputs of a row that does nothing."""
        self.sizes = sizes
        self._padding = padding
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):  # the largest first: the others find its memory in the pool
            inputs = torch.from_numpy(padding.repeat(size, axis=1)).to(device)
            body(inputs)  # what is set up at the first call (workspaces, kernel attributes) cannot be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                results = body(inputs)
            graph.replay()  # the first launch also uploads the graph, which takes its time
            self._inputs[size], self._graphs[size] = inputs, (graph, results)

    def run(self, fields: np.ndarray) -> tuple[Tensor, Tensor]:
        """body's results for a batch, fields [num_fields, n] int32. Valid until the next run, on the same stream."""
        num_rows = fields.shape[1]
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        padded = np.concatenate([fields, self._padding.repeat(size - num_rows, axis=1)], axis=1)
        self._inputs[size].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        graph, (first, second) = self._graphs[size]
        graph.replay()
        return first[:num_rows], second[:num_rows]
