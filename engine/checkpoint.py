"""Where weights come from. Layers pull: each asks by name for the slice it owns, and it is copied straight into place.

Three sources (safetensors, GGUF, random numbers) behind one face. What is asked for comes later, from many threads at
once, and is there when the checkpoint is closed. No whole tensor exists beside the model itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import UserError
from engine.parallel.groups import Group
from engine.safetensors import SafetensorsFolder

OnProgress = Callable[[int, int], None]  # bytes read so far, bytes in all
Index = tuple[slice, ...]  # one slice a dimension
Job = Callable[[], int]  # reads some of a tensor into its place; the bytes read

# On an H200's host one thread brings 8 GB/s from the page cache to the GPU, four 28, eight 51 and sixteen 47.
MAX_THREADS = 8


class Checkpoint(Protocol):
    """Tensors by name. A scope sees those below a prefix of their names."""

    def scope(self, name: str) -> Checkpoint: ...

    def has(self, name: str) -> bool: ...

    def read(
        self,
        name: str,
        into: Tensor,
        dim: int | None = None,
        group: Group | None = None,
        fused: tuple[int, int] | None = None,
        plus: float = 0.0,
    ) -> None:
        """Have `into` (contiguous) filled with a tensor, or with this rank's share of its dimension `dim`.

        It may be filled later, but is when the block of `open_checkpoint` ends.
        fused: (first row, rows in all) where what is meant are some rows of a tensor that holds several, as the q of a
        qkv. plus: added to every number. Raises UserError if the tensor is missing or of another shape than the config
        says.
        """


@contextlib.contextmanager
def open_checkpoint(
    path: Path,
    load_format: str = "auto",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Iterator[Checkpoint]:
    """The weights of a model folder or GGUF file; load_format "dummy": random ones. Raises UserError.

    `with open_checkpoint(path) as ckpt: model.load(ckpt)`: at the end of the block the model has its weights.
    """
    path = Path(path)
    if load_format == "dummy":
        yield DummyCheckpoint(seed)
        return
    source: Source
    if path.suffix == ".gguf":
        from engine.gguf import GGUFFile

        source = GGUFFile(path)
    else:
        source = SafetensorsFolder(path)
    reads = Reads()
    try:
        yield StoredCheckpoint(source, reads)
        num_read = 0
        for num_bytes in reads.results():
            num_read += num_bytes
            if on_progress is not None:
                on_progress(num_read, source.num_bytes)
    finally:
        reads.close()
        source.close()


class Source(Protocol):
    """A file or folder of named tensors, read in parts."""

    path: Path
    num_bytes: int  # of all tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The whole tensor's shape, None if there is no such tensor."""

    def jobs(self, name: str, index: Index, into: Tensor, plus: float) -> Iterable[Job]:
        """What together copies a part of a tensor into place, converts its type and adds `plus`, in any order."""

    def close(self) -> None:
        """Returns when all that jobs have begun has ended."""


class Reads:
    """Jobs at work in threads. Reading gives up the interpreter's lock, so they do run beside each other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="reading")
        self._futures: list[list[Future[int]]] = []

    def submit(self, jobs: Iterable[Job]) -> None:
        self._futures.append([self._pool.submit(job) for job in jobs])

    def results(self) -> Iterator[int]:
        """The bytes that the jobs of each `submit` read, in order, when they are done. Raises what a job raised."""
        for futures in self._futures:
            yield sum(future.result() for future in futures)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class StoredCheckpoint:
    """Weights in files."""

    source: Source
    reads: Reads
    prefix: str = ""

    def scope(self, name: str) -> StoredCheckpoint:
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return self.source.shape(self.prefix + name) is not None

    def read(
        self,
        name: str,
        into: Tensor,
        dim: int | None = None,
        group: Group | None = None,
        fused: tuple[int, int] | None = None,
        plus: float = 0.0,
    ) -> None:
        name, group = self.prefix + name, group or Group()
        whole = _whole_shape(into, dim, group)
        index = [slice(0, length) for length in whole]
        if fused is not None:
            first, num_rows = fused
            index[0] = slice(first, first + whole[0])
            whole[0] = num_rows
        found = self.source.shape(name)
        if found is None:
            raise UserError(f"{self.source.path} has no tensor {name}: its weights are not those of its config")
        if found != tuple(whole):
            raise UserError(
                f"{self.source.path}: tensor {name} has shape {list(found)}, but its config asks for {whole}: "
                "config and weights are of different models"
            )
        if dim is not None:
            start, share = index[dim].start, group.shard(index[dim].stop - index[dim].start)
            index[dim] = slice(start + share.start, start + share.stop)
        self.reads.submit(self.source.jobs(name, tuple(index), into, plus))


@dataclass(frozen=True)
class DummyCheckpoint:
    """Random weights, made on the device where they go; a tensor depends on its name and the seed only."""

    seed: int
    prefix: str = ""

    def scope(self, name: str) -> DummyCheckpoint:
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return True

    def read(
        self,
        name: str,
        into: Tensor,
        dim: int | None = None,
        group: Group | None = None,
        fused: tuple[int, int] | None = None,
        plus: float = 0.0,
    ) -> None:
        group = group or Group()
        if "norm" in self.prefix + name:
            into.fill_(1 + plus)
            return
        digest = hashlib.sha256(f"{self.seed}/{self.prefix}{name}/{fused}".encode()).digest()
        generator = torch.Generator(into.device).manual_seed(int.from_bytes(digest[:6], "little"))
        shape = _whole_shape(into, dim, group)
        whole = into if shape == list(into.shape) else into.new_empty(shape)
        whole.normal_(0, shape[-1] ** -0.5, generator=generator)  # this scale keeps the variance of what goes through
        if dim is not None and whole is not into:
            share = group.shard(shape[dim])
            into.copy_(whole.narrow(dim, share.start, share.stop - share.start))


def _whole_shape(into: Tensor, dim: int | None, group: Group) -> list[int]:
    return [length * group.size if i == dim else length for i, length in enumerate(into.shape)]
