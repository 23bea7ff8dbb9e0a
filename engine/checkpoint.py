"""Where weights come from. Layers pull: each asks by name for the slice it owns, and it is copied straight into place.

Three sources (safetensors, GGUF, random numbers) behind one face. At no time does more than one tensor exist beside
the model itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import UserError
from engine.parallel.groups import Group

OnProgress = Callable[[int, int], None]  # bytes read so far, bytes in all
Index = tuple[slice, ...]  # one slice a dimension


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
    ) -> None:
        """Fill `into` with a tensor, or with this rank's share of its dimension `dim`.

        fused: (first row, rows in all) where what is meant are some rows of a tensor that holds several, as the q of a
        qkv. Raises UserError if the tensor is missing or of another shape than the config says.
        """


def open_checkpoint(
    path: Path,
    load_format: str = "auto",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Checkpoint:
    """The weights of a model folder or GGUF file; load_format "dummy": random ones. Raises UserError."""
    path = Path(path)
    if load_format == "dummy":
        return DummyCheckpoint(seed)
    source: Source
    if path.suffix == ".gguf":
        from engine.gguf import GGUFFile

        source = GGUFFile(path)
    else:
        source = SafetensorsFolder(path)
    num_read = 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal num_read
        num_read += num_bytes
        if on_progress is not None:
            on_progress(num_read, source.num_bytes)

    return StoredCheckpoint(source, on_bytes)


class Source(Protocol):
    """A file or folder of named tensors, read in parts."""

    path: Path
    num_bytes: int  # of all tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The whole tensor's shape, None if there is no such tensor."""

    def read(self, name: str, index: Index, into: Tensor) -> int:
        """Copies a part into place, converting its type. Returns the bytes read."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """Weights in files."""

    source: Source
    on_bytes: Callable[[int], None]
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
        self.on_bytes(self.source.read(name, tuple(index), into))


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
    ) -> None:
        group = group or Group()
        if "norm" in self.prefix + name:
            into.fill_(1)
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


class SafetensorsFolder:
    """The *.safetensors of a folder: one file, or several with an index."""

    DTYPES = ("F64", "F32", "F16", "BF16")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.files: dict[str, Any] = {}  # tensor name: the open file that holds it
        for file in _safetensors_files(path):
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            with file.open("rb") as head:
                if head.read(20).startswith(b"version https://git-"):
                    raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`") from error
            raise UserError(f"{file} is corrupt or cut short ({error}): download it again") from error
        self.files |= dict.fromkeys(opened.keys(), opened)
        self.num_bytes += file.stat().st_size

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.files[name].get_slice(name).get_shape()) if name in self.files else None

    def read(self, name: str, index: Index, into: Tensor) -> int:
        stored = self.files[name].get_slice(name)
        if stored.get_dtype() not in self.DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {stored.get_dtype()}, supported are {self.DTYPES}"
            )
        part = stored[index]
        into.copy_(part)
        return part.nbytes


def _safetensors_files(path: Path) -> list[Path]:
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
