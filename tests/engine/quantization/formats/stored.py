"""A checkpoint in a dict, for formats to read from."""

from pathlib import Path

import torch
from torch import Tensor

from engine.quantization.formats import Get

SOURCE = Path("folder/config.json")


def stored(tensors: dict[str, Tensor]) -> Get:
    """As strict as a checkpoint: what is asked for is there, and as it is asked for."""

    def get(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        tensor = tensors[name]
        assert tensor.numel() == 1 or tuple(tensor.shape) == tuple(shape), f"{name} {tensor.shape} asked as {shape}"
        assert tensor.dtype == dtype or (dtype is None and tensor.is_floating_point()), f"{name} {tensor.dtype}"
        return tensor.reshape(shape)

    return get


def words(*shape: int, seed: int = 0) -> Tensor:
    """Any bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def scales(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def digit(word: int, place: int, bits: int) -> int:
    """The number that starts `place` numbers into a word."""
    return (int(word) >> (place * bits)) % (1 << bits)
