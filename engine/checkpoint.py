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
from functools import partial
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import UserError
from engine.parallel.groups import Group
from engine.quantization.formats.format import Get
from engine.quantization.weight import E4M3, QuantizedWeight, Scheme
from engine.safetensors import SafetensorsFolder

OnProgress = Callable[[int, int], None]  # bytes read so far, bytes in all
Index = tuple[slice, ...]  # one slice a dimension
Job = Callable[[], int]  # reads some of a tensor into its place; the bytes read

# On an H200's host one thread brings 8 GB/s from the page cache to the GPU, four 28, eight 51 and sixteen 47.
MAX_THREADS = 8


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # converted into each other as asked for


class LinearFormat(Protocol):
    """How linear layers' weights are stored where they are no plain tensors, or made of plain ones.

    Names are those of layers, as `model.layers.0.self_attn.q_proj`.
    """

    def scheme_of(self, name: str) -> Scheme | None:
        """None: a plain tensor `name`.weight."""

    def group_of(self, name: str, in_features: int, get: Get) -> Tensor | None:
        """What the weight's `group_of` will be."""

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight: ...


class Checkpoint(Protocol):
    """Tensors by name. A scope sees those below a prefix of their names."""

    @property
    def prefix(self) -> str: ...

    def scope(self, name: str) -> Checkpoint: ...

    def has(self, name: str) -> bool: ...

    def has_layer(self, name: str) -> bool:
        """Whether a linear layer of this name is stored, in whatever form."""

    def scheme_of(self, name: str) -> Scheme | None:
        """Of a linear layer's weight; None: it is a plain tensor."""

    def group_of(self, name: str, in_features: int) -> Tensor | None:
        """Of a linear layer's weight that has a scheme: as of a QuantizedWeight."""

    def read_quantized(
        self, name: str, shape: tuple[int, int], fill: Callable[[QuantizedWeight], None], device: torch.device
    ) -> None:
        """Have `fill` called with a linear layer's weight [out, in], by another thread, as late as `read` may read.

        device: where the numbers will lie in the end. Raises UserError, also at the end of the block.
        """

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
    linear_format: LinearFormat | None = None,
) -> Iterator[Checkpoint]:
    """The weights of a model folder or GGUF file; load_format "dummy": random ones. Raises UserError.

    linear_format: of weights that are no plain tensors, or are not to stay it.

    `with open_checkpoint(path) as ckpt: model.load(ckpt)`: at the end of the block the model has its weights.
    """
    path = Path(path)
    if load_format == "dummy":
        yield DummyCheckpoint(seed, linear_format)
        return
    source: Source
    if path.suffix == ".gguf":
        from engine.gguf import GGUFFile

        source = GGUFFile(path)
    else:
        source = SafetensorsFolder(path)
    reads = Reads()
    try:
        yield StoredCheckpoint(source, reads, linear_format)
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

    def has_layer(self, name: str) -> bool:
        """Whether there are tensors of a layer of this name."""

    def whole(self, name: str) -> tuple[Tensor, int]:
        """A whole tensor, on the host, in the type it is stored in if torch has it, and the bytes read."""

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
    linear_format: LinearFormat | None = None
    prefix: str = ""

    def scope(self, name: str) -> StoredCheckpoint:
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return self.source.shape(self.prefix + name) is not None

    def has_layer(self, name: str) -> bool:
        return self.source.has_layer(self.prefix + name)

    def scheme_of(self, name: str) -> Scheme | None:
        return self.linear_format.scheme_of(self.prefix + name) if self.linear_format else None

    def group_of(self, name: str, in_features: int) -> Tensor | None:
        assert self.linear_format is not None
        return self.linear_format.group_of(self.prefix + name, in_features, lambda *asked: self._get(*asked)[0])

    def read_quantized(
        self, name: str, shape: tuple[int, int], fill: Callable[[QuantizedWeight], None], device: torch.device
    ) -> None:
        assert self.linear_format is not None
        self.reads.submit([partial(self._read_quantized, self.linear_format, self.prefix + name, shape, fill)])

    def _read_quantized(
        self, form: LinearFormat, name: str, shape: tuple[int, int], fill: Callable[[QuantizedWeight], None]
    ) -> int:
        num_read = 0

        def get(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
            nonlocal num_read
            tensor, num_bytes = self._get(name, shape, dtype)
            num_read += num_bytes
            return tensor

        fill(form.read(name, shape, get))
        return num_read

    def _get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> tuple[Tensor, int]:
        """A tensor as a Get gives it, and the bytes read."""
        self._check_shape(name, shape)
        tensor, num_bytes = self.source.whole(name)
        if not (tensor.dtype in FLOATS and dtype in (None, *FLOATS)) and tensor.dtype != dtype:
            stored, asked = (str(what).removeprefix("torch.") for what in (tensor.dtype, dtype or "float"))
            raise UserError(f"{self.source.path}: tensor {name} is stored as {stored}, but its config asks for {asked}")
        return tensor.reshape(shape).to(dtype or tensor.dtype), num_bytes

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """A single number may be stored in any shape."""
        found = self.source.shape(name)
        if found is None:
            raise UserError(f"{self.source.path} has no tensor {name}: its weights are not those of its config")
        if found != shape and not prod(found) == prod(shape) == 1:
            raise UserError(
                f"{self.source.path}: tensor {name} has shape {list(found)}, but its config asks for {list(shape)}: "
                "config and weights are of different models"
            )

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
        self._check_shape(name, tuple(whole))
        if dim is not None:
            start, share = index[dim].start, group.shard(index[dim].stop - index[dim].start)
            index[dim] = slice(start + share.start, start + share.stop)
        self.reads.submit(self.source.jobs(name, tuple(index), into, plus))


@dataclass(frozen=True)
class DummyCheckpoint:
    """Random weights, made on the device where they go; a tensor depends on its name and the seed only."""

    seed: int
    linear_format: LinearFormat | None = None
    prefix: str = ""

    def scope(self, name: str) -> DummyCheckpoint:
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return True

    def has_layer(self, name: str) -> bool:
        return False

    def scheme_of(self, name: str) -> Scheme | None:
        return self.linear_format.scheme_of(self.prefix + name) if self.linear_format else None

    def group_of(self, name: str, in_features: int) -> Tensor | None:
        return None

    def read_quantized(
        self, name: str, shape: tuple[int, int], fill: Callable[[QuantizedWeight], None], device: torch.device
    ) -> None:
        scheme = self.scheme_of(name)
        assert scheme is not None
        generator = self._generator(name, device)
        if scheme.kind == "int":
            limits = (scheme.lowest, -scheme.lowest)
            numbers = torch.randint(*limits, shape, dtype=torch.int8, device=device, generator=generator)
            spread = 2**scheme.bits / 12**0.5
        else:
            numbers = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator).to(E4M3)
            spread = 1.0
        grid = scheme.grid_shape(*shape)
        scales = torch.full(grid, shape[1] ** -0.5 / spread, device=device)
        zeros = None if scheme.is_symmetric else torch.zeros(grid, dtype=torch.int16, device=device)
        fill(QuantizedWeight(scheme, numbers, scales, zeros))

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
        generator = self._generator(name, into.device)
        shape = _whole_shape(into, dim, group)
        whole = into if shape == list(into.shape) else into.new_empty(shape)
        whole.normal_(0, shape[-1] ** -0.5, generator=generator)  # this scale keeps the variance of what goes through
        if dim is not None and whole is not into:
            share = group.shard(shape[dim])
            into.copy_(whole.narrow(dim, share.start, share.stop - share.start))

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{self.prefix}{name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "little"))


def _whole_shape(into: Tensor, dim: int | None, group: Group) -> list[int]:
    return [length * group.size if i == dim else length for i, length in enumerate(into.shape)]
