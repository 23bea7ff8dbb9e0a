"""The format `awq`, of AutoAWQ, laid out for its `gemm` kernel: 4-bit integers in groups of inputs, with zeros.

Tensors of a layer [out, in] with `groups` groups; all words are packed along the outputs, of which those at even places
come first:
    qweight  int32 [in, out / 8]
    qzeros   int32 [groups, out / 8]
    scales   float16 [groups, out]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.quantization.formats.format import (
    Get,
    check_divides,
    describe,
    group_columns,
    is_part_of,
    names_of,
    one_of,
)
from engine.quantization.packing import num_words, pack, unpack
from engine.quantization.weight import ALL, QuantizedWeight, Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 outputs each place of a word holds
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in which place each of 8 outputs is


@dataclass(frozen=True)
class AWQ:
    scheme: Scheme
    ignored: tuple[str, ...] = ()  # names, or parts of names, of layers that are stored as they are

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> AWQ:
        key = "version" if config.get("version") else "format"
        one_of({key: str(config.get(key) or "gemm").lower()}, key, ("gemm",), "gemm", source)
        one_of(config, "bits", (4,), None, source)
        one_of(config, "zero_point", (True,), True, source)
        scheme = Scheme("int", 4, (1, group_columns(config, source)), is_symmetric=False)
        return cls(scheme, names_of(config, "modules_to_not_convert", source))

    @classmethod
    def make(cls, scheme: Scheme, act_order: bool, ignored: Sequence[str]) -> AWQ:
        if (scheme.kind, scheme.bits, scheme.is_symmetric, scheme.rounds_inputs) != ("int", 4, False, False):
            raise UserError(
                f"format awq holds 4-bit integers with zeros in groups of inputs, not {describe(scheme)}: "
                "add --asym to --int4, or choose --format compressed-tensors"
            )
        if act_order:
            raise UserError("format awq cannot say an activation order: leave out --desc-act, or add --format gptq")
        return cls(scheme, tuple(ignored))

    def scheme_of(self, name: str) -> Scheme | None:
        return None if is_part_of(name, ("lm_head", *self.ignored)) else self.scheme

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight:
        out_features, in_features = shape
        groups, words = self.scheme.grid_shape(*shape)[1], num_words(out_features, 4)
        numbers = _unpack(get(f"{name}.qweight", (in_features, words), torch.int32), out_features)
        zeros = _unpack(get(f"{name}.qzeros", (groups, words), torch.int32), out_features)
        scales = get(f"{name}.scales", (groups, out_features), None).T.contiguous()
        return QuantizedWeight(self.scheme, numbers, scales, zeros.to(torch.int16))

    def group_of(self, name: str, in_features: int, get: Get) -> Tensor | None:
        return None

    def check(self, name: str, shape: tuple[int, int]) -> None:
        check_divides(name, shape, outputs=8, inputs=math.lcm(8, self.scheme.block[1] or 1), format_name="awq")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def write(self, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert weight.zeros is not None, f"{name} is symmetric"
        assert weight.group_of is None, f"{name} has an activation order"
        tensors = {
            "qweight": _pack(weight.numbers),
            "qzeros": _pack(weight.zeros.to(torch.int8)),
            "scales": weight.scales.T.to(self.scale_dtype(dtype)),
        }
        return {f"{name}.{kind}": tensor.cpu().contiguous() for kind, tensor in tensors.items()}

    def config(self) -> dict[str, Any]:
        columns = self.scheme.block[1]
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": -1 if columns == ALL else columns,
            "zero_point": True,
            "modules_to_not_convert": list(self.ignored) or None,
        }


def _pack(numbers: Tensor) -> Tensor:
    """[out, length] → words [length, out / 8]."""
    eights = numbers.T.reshape(numbers.shape[1], -1, 8)
    return pack(eights[:, :, ORDER].flatten(1), 4)


def _unpack(words: Tensor, out_features: int) -> Tensor:
    """Words [length, out / 8] → [out, length]."""
    eights = unpack(words, 4, 8 * words.shape[1]).view(*words.shape, 8)
    return eights[:, :, PLACES].flatten(1)[:, :out_features].T.contiguous()
