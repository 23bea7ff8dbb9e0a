"""What a checkpoint format is: the tensors that a QuantizedWeight is stored as, and the config that tells of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from engine.errors import UserError
from engine.quantization.weight import ALL, QuantizedWeight, Scheme

# A tensor of the checkpoint by name, on the CPU, of the shape (a single number may be stored in any) and the type asked
# for; None: the floating type that it is stored in. Raises UserError if it is missing or another.
Get = Callable[[str, tuple[int, ...], torch.dtype | None], Tensor]


class Format(Protocol):
    """Names are those of linear layers in the checkpoint, as `model.layers.0.self_attn.q_proj`."""

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> Self:
        """Of a `quantization_config` in the file `source`. Raises UserError."""

    @classmethod
    def make(cls, scheme: Scheme, act_order: bool, ignored: Sequence[str]) -> Self:
        """See `make_format`."""

    def scheme_of(self, name: str) -> Scheme | None:
        """What a layer's weight is rounded to. None: it is stored as it is, unrounded."""

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight:
        """The weight [out, in] of a layer that has a scheme. Raises UserError."""

    def group_of(self, name: str, in_features: int, get: Get) -> Tensor | None:
        """The `group_of` that the weight read has: None where groups lie one after the other."""

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises UserError unless a weight [out, in] can be written so that the format's readers take it."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the scales that are written for a model of this type: a solver rounds its scales to it first."""

    def write(self, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors, on the CPU, that `read` makes the same weight of; dtype: the model's."""

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""


def one_of(config: dict[str, Any], key: str, supported: Collection[Any], default: Any, source: Path) -> Any:
    """The value of a config. Raises UserError if it is none of those supported."""
    value = config.get(key)
    value = default if value is None else value
    if value not in supported:
        choices = ", ".join(repr(choice) for choice in supported)
        raise UserError(f"{source}: {key} {value!r} of its quantization is not supported; supported: {choices}")
    return value


def group_columns(config: dict[str, Any], source: Path) -> int:
    """The columns of a block, of a config's group_size; -1 there is a whole row."""
    size = config.get("group_size", -1)
    size = -1 if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise UserError(f"{source}: group_size {size!r} of its quantization must be a positive number, or -1 for a row")
    return ALL if size == -1 else size


def block_sides(config: dict[str, Any], key: str, source: Path) -> tuple[int, int]:
    """Rows and columns of a block."""
    block = config.get(key)
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block):
        raise UserError(f"{source}: {key} {block!r} of its quantization must be two positive numbers, as [128, 128]")
    return (block[0], block[1])


def names_of(config: dict[str, Any], key: str, source: Path) -> tuple[str, ...]:
    """A list of names in a config."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{source}: {key} {names!r} of its quantization must be a list of names")
    return tuple(names)


def is_part_of(name: str, parts: Collection[str]) -> bool:
    """Whether a layer's name has one of these in it, as a whole: `mlp` and `layers.1` but not `layers.10`."""
    return any(f".{part}." in f".{name}." for part in parts)


def describe(scheme: Scheme) -> str:
    """As in `4-bit integers with zeros in groups of 64 inputs`."""
    rows, columns = scheme.block
    places = {(1, columns): f"groups of {columns} inputs", (1, ALL): "rows", (ALL, ALL): "one block"}
    numbers = "e4m3" if scheme.kind == "float" else f"{scheme.bits}-bit integers"
    zeros = "" if scheme.is_symmetric else " with zeros"
    inputs = " and rounded inputs" if scheme.rounds_inputs else ""
    return f"{numbers}{zeros} in {places.get(scheme.block, f'blocks of {rows} x {columns}')}{inputs}"


def check_divides(name: str, shape: tuple[int, int], *, outputs: int = 1, inputs: int = 1, format_name: str) -> None:
    """Raises UserError unless a layer's [out, in] are multiples of what the format packs or groups together."""
    for what, length, unit in (("outputs", shape[0], outputs), ("inputs", shape[1], inputs)):
        if length % unit:
            raise UserError(
                f"{name} has {length:,} {what}, and format {format_name} takes them {unit} at a time, which does not "
                "divide: choose a smaller group size or --format compressed-tensors, or leave the layer out with --skip"
            )
