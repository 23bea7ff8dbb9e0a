"""The formats `fp8` (of DeepSeek, Qwen and transformers' FineGrainedFP8) and `fbgemm_fp8` (of Llama 3.1): e4m3 weights.

A layer [out, in] is `weight` e4m3 [out, in] and its scales, float32: `weight_scale_inv`, which for all its name is a
factor, one a block, or one in all where there are no blocks; of fbgemm_fp8 `weight_scale` [out, 1].

Inputs are rounded token by token: a scale of theirs that is stored beside the weight, or a bound to it, is left aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import UserError
from engine.quantization.formats.format import Get, block_sides, check_divides, describe, is_part_of, names_of, one_of
from engine.quantization.weight import ALL, E4M3, QuantizedWeight, Scheme

SCALES = {"fp8": "weight_scale_inv", "fbgemm_fp8": "weight_scale"}


@dataclass(frozen=True)
class FineGrainedFP8:
    scheme: Scheme
    ignored: tuple[str, ...] = ()  # names, or parts of names, of layers that are stored as they are
    method: Literal["fp8", "fbgemm_fp8"] = "fp8"

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> FineGrainedFP8:
        method = config["quant_method"]
        ignored = names_of(config, "modules_to_not_convert", source) or names_of(config, "ignored_layers", source)
        if method == "fbgemm_fp8":
            return cls(_scheme((1, ALL)), ignored, method)
        one_of(config, "fmt", ("e4m3",), "e4m3", source)
        one_of(config, "scale_fmt", ("float",), "float", source)
        one_of(config, "activation_scheme", ("dynamic", "static"), "dynamic", source)
        has_blocks = config.get("weight_block_size") is not None
        return cls(_scheme(block_sides(config, "weight_block_size", source) if has_blocks else (ALL, ALL)), ignored)

    @classmethod
    def make(cls, scheme: Scheme, act_order: bool, ignored: Sequence[str]) -> FineGrainedFP8:
        if scheme.kind != "float" or min(scheme.block) <= 1 or not scheme.rounds_inputs:
            raise UserError(
                f"format fp8 holds e4m3 in square blocks with rounded inputs, not {describe(scheme)}: "
                "choose --format compressed-tensors"
            )
        return cls(scheme, ("lm_head", *ignored))

    def scheme_of(self, name: str) -> Scheme | None:
        return None if is_part_of(name, ("lm_head", *self.ignored)) else self.scheme

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight:
        numbers = get(f"{name}.weight", shape, E4M3)
        scales = get(f"{name}.{SCALES[self.method]}", self.scheme.grid_shape(*shape), None)
        return QuantizedWeight(self.scheme, numbers, scales)

    def group_of(self, name: str, in_features: int, get: Get) -> Tensor | None:
        return None

    def check(self, name: str, shape: tuple[int, int]) -> None:
        rows, columns = self.scheme.block  # transformers refuses blocks that stick out
        check_divides(name, shape, outputs=rows, inputs=columns, format_name="fp8")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def write(self, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        scales = weight.scales.to(self.scale_dtype(dtype))
        return {
            f"{name}.weight": weight.numbers.cpu().contiguous(),
            f"{name}.weight_scale_inv": scales.cpu().contiguous(),
        }

    def config(self) -> dict[str, Any]:
        assert self.method == "fp8", "fbgemm_fp8 is read only"
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": None if self.scheme.block == (ALL, ALL) else list(self.scheme.block),
            "modules_to_not_convert": list(self.ignored),
        }


def _scheme(block: tuple[int, int]) -> Scheme:
    return Scheme("float", 8, block, rounds_inputs=True)
