"""Safetensors: the files of a folder, their headers, and their tensors read in parts of a buffer's size.

A part is read from its place in the file, without a map of it: a page of the cache is copied once, into memory that is
there already. What a file's header says is checked against the file before anything is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.staging import Staging

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    descriptor: int  # of the open file
    dtype: str  # in the format's own words
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


class SafetensorsFolder:
    """The *.safetensors of a folder: one file, or several with an index."""

    def __init__(self, path: Path, make_staging: Callable[[torch.device], Staging] = Staging) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self._make_staging = make_staging
        with contextlib.ExitStack() as opened:
            for file in _files(path):
                try:
                    descriptor = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise UserError(f"{file} cannot be opened ({error.strerror}): check its permissions") from error
                opened.callback(os.close, descriptor)
                self.tensors |= _read_header(file, descriptor)
            self._opened = opened.pop_all()
        self._staging: Staging | None = None
        self.num_bytes = sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.tensors else None

    def has_layer(self, name: str) -> bool:
        return any(tensor.startswith(f"{name}.") for tensor in self.tensors)

    def whole(self, name: str) -> tuple[Tensor, int]:
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UserError(f"{self.path}: tensor {name} is stored as {tensor.dtype}, supported are {tuple(DTYPES)}")
        found = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        _read_bytes(tensor, 0, found.view(-1).view(torch.uint8))
        return found, found.nbytes

    def jobs(self, name: str, index: tuple[slice, ...], into: Tensor, plus: float) -> Iterator[Callable[[], int]]:
        tensor = self.tensors[name]
        if tensor.dtype not in FLOATS:
            raise UserError(f"{self.path}: tensor {name} is stored as {tensor.dtype}, supported are {tuple(FLOATS)}")
        self._staging = staging = self._staging or self._make_staging(into.device)
        rows, columns, row_shape = index[0], index[1:], tensor.shape[1:]
        assert into.is_contiguous(), f"the place of {name} has gaps: {into.stride()} for {into.shape}"
        if columns == tuple(slice(0, length) for length in row_shape):
            # One piece of the file: as one long row of numbers it can be cut anywhere.
            row_length = prod(row_shape)
            rows, columns, row_shape = slice(rows.start * row_length, rows.stop * row_length), (), ()
            into = into.view(-1)
        row_bytes = prod(row_shape) * DTYPES[tensor.dtype].itemsize
        step = staging.buffer_bytes // row_bytes
        assert step, f"a row of {name} has {row_bytes:,} bytes, a buffer {staging.buffer_bytes:,}"
        is_made = staging.now()
        for first in range(rows.start, rows.stop, step):
            num_rows = min(step, rows.stop - first)
            place = into[first - rows.start :][:num_rows]
            shape = (num_rows, *row_shape)
            yield partial(_read, staging, is_made, tensor, first * row_bytes, shape, columns, place, plus)

    def close(self) -> None:
        """Returns when all that was read is in its place."""
        if self._staging is not None:
            self._staging.close()
        self._opened.close()


def _read(
    staging: Staging, is_made: torch.cuda.Event | None, tensor: StoredTensor, at: int, shape: tuple[int, ...],
    columns: tuple[slice, ...], into: Tensor, plus: float,
) -> int:  # fmt: skip
    """Rows of a tensor, `at` bytes from its start, cut as `columns` says, into their place. Returns their bytes."""
    dtype = DTYPES[tensor.dtype]
    is_as_stored = not columns and into.dtype == dtype
    if is_as_stored and into.device.type == "cpu":
        _read_bytes(tensor, at, into.view(torch.uint8))
        if plus:
            into += plus
        return into.nbytes
    with staging.buffer(after=is_made) as buffer:
        stored = buffer[: prod(shape) * dtype.itemsize]
        _read_bytes(tensor, at, stored)
        stored = stored.view(dtype).view(shape)
        if not is_as_stored:  # the GPU cuts and converts: out of pinned memory only a plain copy is a quick one
            stored = stored.to(into.device, non_blocking=True)[:, *columns]
        into.copy_(stored, non_blocking=True)
        if plus:
            into += plus
    return stored.nbytes


def _read_bytes(tensor: StoredTensor, at: int, into: Tensor) -> None:
    """Fill `into`, uint8 on the host, from `at` bytes after the tensor's start."""
    view, done = into.numpy().data, 0
    while done < len(view):
        try:
            num_read = os.preadv(tensor.descriptor, [view[done:]], tensor.start + at + done)
        except OSError as error:
            raise UserError(f"{tensor.file} cannot be read ({error}): check its disk, or copy it again") from error
        if num_read == 0:
            raise UserError(f"{tensor.file} is cut short (it became shorter while it was read): download it again")
        done += num_read


def _read_header(file: Path, descriptor: int) -> dict[str, StoredTensor]:
    """What a file says it holds. Raises UserError unless that is what it holds."""
    file_bytes = os.fstat(descriptor).st_size
    head = os.pread(descriptor, 8, 0)
    try:
        data_start = 8 + struct.unpack("<Q", head)[0]
        if data_start > file_bytes:
            raise ValueError(f"it has {file_bytes:,} bytes, its header ends at {data_start:,}")
        entries = json.loads(os.pread(descriptor, data_start - 8, 8))
        entries.pop("__metadata__", None)
        tensors = {name: _stored_tensor(file, descriptor, entry, data_start) for name, entry in entries.items()}
        end = max((tensor.stop for tensor in tensors.values()), default=data_start)
        if end != file_bytes:
            raise ValueError(f"it has {file_bytes:,} bytes, its tensors end at {end:,}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if head == b"version ":
            raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`") from error
        raise UserError(f"{file} is corrupt or cut short ({error}): download it again") from error
    return tensors


def _stored_tensor(file: Path, descriptor: int, entry: dict[str, Any], data_start: int) -> StoredTensor:
    (start, stop), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    if not 0 <= start <= stop or (dtype in DTYPES and stop - start != prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"bytes {start:,} to {stop:,} for a tensor of {dtype} {list(shape)}")
    return StoredTensor(file, descriptor, dtype, shape, data_start + start, data_start + stop)


def _files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index ({error}): download it again") from error
        if missing := [name for name in names if not (path / name).is_file()]:
            raise UserError(f"{path} lacks {', '.join(missing)}, named in {index.name}: download them")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if files := sorted(path.glob("*.safetensors")):
        return files
    hint = "add --load-format dummy to run with random weights"
    if list(path.glob("*.bin")) or list(path.glob("*.pt*")):
        hint = "its pickled weights are not read; convert them to safetensors, or " + hint
    raise UserError(f"{path} holds no weights (*.safetensors): {hint}")
