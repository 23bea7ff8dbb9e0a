"""The format `gptq`, of AutoGPTQ and GPTQModel: integers of 4 or 8 bits in groups of inputs, any input in any group.

Tensors of a layer [out, in] with `groups` groups; a word holds 8 numbers of 4 bits, or 4 of 8 bits:
    qweight  int32 [in / 8, out]      packed along the inputs
    qzeros   int32 [groups, out / 8]  packed along the outputs
    scales   float16 [groups, out]
    g_idx    int32 [in]               the group of each input
Version 1 stores one less than a zero, and subtracts it from whole words, as GPTQModel does: a zero of 0 borrows from
its neighbour.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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

ONES = {4: 0x11111111, 8: 0x01010101}  # a word of ones


@dataclass(frozen=True)
class GPTQ:
    scheme: Scheme
    act_order: bool = False
    version: int = 1
    modules: tuple[str, ...] = ()  # the layers of a block that are quantized; none named: all
    # Regular expression of names → what differs for them from the scheme; None: they are stored as they are.
    overrides: dict[str, Scheme | None] = field(default_factory=dict)
    has_lm_head: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> GPTQ:
        if config.get("is_marlin_format"):
            raise UserError(f"{source}: its weights are laid out for Marlin's kernel: use the original GPTQ checkpoint")
        key = "checkpoint_format" if config.get("checkpoint_format") else "format"
        version = one_of(config, key, ("gptq", "gptq_v2"), "gptq", source)
        one_of(config, "pack_dtype", ("int32",), "int32", source)
        blocks = config.get("modules_in_block_to_quantize") or []
        modules = [name for names in blocks for name in (names if isinstance(names, list) else [names])]
        overrides = {}
        for pattern, values in (config.get("dynamic") or {}).items():
            scheme = None if pattern.startswith("-:") else _scheme(config | values, source)
            overrides[pattern.removeprefix("-:").removeprefix("+:")] = scheme
        return cls(
            _scheme(config, source),
            act_order=bool(config.get("desc_act")),
            version=2 if version == "gptq_v2" else 1,
            modules=names_of({"modules": modules}, "modules", source),
            overrides=overrides,
            has_lm_head=bool(config.get("lm_head")),
        )

    @classmethod
    def make(cls, scheme: Scheme, act_order: bool, ignored: Sequence[str]) -> GPTQ:
        if scheme.kind != "int" or scheme.block[0] != 1 or scheme.rounds_inputs:
            raise UserError(
                f"format gptq holds integers in groups of inputs, not {describe(scheme)}: "
                "choose --format compressed-tensors"
            )
        # A group of positive weights has a zero of 0, and readers of version 1 disagree on what 0 - 1 is.
        return cls(scheme, act_order, 1 if scheme.is_symmetric else 2, overrides=dict.fromkeys(map(_exactly, ignored)))

    def scheme_of(self, name: str) -> Scheme | None:
        if name.split(".")[-1] == "lm_head" and not self.has_lm_head:
            return None
        for pattern, scheme in self.overrides.items():
            if re.match(pattern, name):
                return scheme
        return self.scheme if not self.modules or is_part_of(name, self.modules) else None

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight:
        scheme = self.scheme_of(name)
        assert scheme is not None, f"{name} is not quantized"
        out_features, in_features = shape
        groups = scheme.grid_shape(*shape)[1]
        numbers = get(f"{name}.qweight", (num_words(in_features, scheme.bits), out_features), torch.int32)
        zeros = get(f"{name}.qzeros", (groups, num_words(out_features, scheme.bits)), torch.int32)
        if self.version == 1:
            zeros = zeros + ONES[scheme.bits]
        zeros = unpack(zeros, scheme.bits, out_features)
        if scheme.is_symmetric and zeros.any():
            raise UserError(f'{name}.qzeros has zeros, but its config says "sym": true: set it to false there')
        return QuantizedWeight(
            scheme,
            unpack(numbers.T, scheme.bits, in_features),
            get(f"{name}.scales", (groups, out_features), None).T.contiguous(),
            None if scheme.is_symmetric else zeros.T.to(torch.int16).contiguous(),
            self.group_of(name, in_features, get),
        )

    def group_of(self, name: str, in_features: int, get: Get) -> Tensor | None:
        scheme = self.scheme_of(name)
        assert scheme is not None, f"{name} is not quantized"
        return stored_groups(f"{name}.g_idx", scheme, in_features, get)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        per_word = 32 // self.scheme.bits
        inputs = math.lcm(per_word, self.scheme.block[1] or 1)
        check_divides(name, shape, outputs=per_word, inputs=inputs, format_name="gptq")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def write(self, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        bits, group_of, in_features = weight.scheme.bits, weight.group_of, weight.numbers.shape[1]
        zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
        if group_of is None:
            group_of = _groups_in_order(in_features, weight.scheme)
        tensors = {
            "qweight": pack(weight.numbers, bits).T,
            "qzeros": pack(zeros.to(torch.int8).T, bits) - (ONES[bits] if self.version == 1 else 0),
            "scales": weight.scales.T.to(self.scale_dtype(dtype)),
            "g_idx": group_of.to(torch.int32, copy=True),  # layers of the same inputs have the same one
        }
        return {f"{name}.{kind}": tensor.cpu().contiguous() for kind, tensor in tensors.items()}

    def config(self) -> dict[str, Any]:
        dynamic = {
            f"+:{pattern}" if scheme else f"-:{pattern}": _values(scheme) if scheme else {}
            for pattern, scheme in self.overrides.items()
        }
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            **_values(self.scheme),
            "desc_act": self.act_order,
            "lm_head": self.has_lm_head,
            "pack_dtype": "int32",
            **({"modules_in_block_to_quantize": [list(self.modules)]} if self.modules else {}),
            **({"dynamic": dynamic} if dynamic else {}),
        }


def stored_groups(name: str, scheme: Scheme, in_features: int, get: Get) -> Tensor | None:
    """The groups that a tensor of the checkpoint gives the inputs, int32 [in]; None if one lies after the other."""
    groups = get(name, (in_features,), torch.int32)
    num_groups = scheme.grid_shape(1, in_features)[1]
    if groups.min() < 0 or groups.max() >= num_groups:
        worst = groups.min().item() if groups.min() < 0 else groups.max().item()
        raise UserError(f"{name} names group {worst} of {num_groups}: the checkpoint is damaged, download it again")
    return None if torch.equal(groups, _groups_in_order(in_features, scheme)) else groups


def _groups_in_order(in_features: int, scheme: Scheme) -> Tensor:
    return torch.arange(in_features, dtype=torch.int32) // (scheme.block[1] or in_features)


def _scheme(config: dict[str, Any], source: Path) -> Scheme:
    bits = one_of(config, "bits", (4, 8), None, source)
    is_symmetric = one_of(config, "sym", (True, False), True, source)
    return Scheme("int", bits, (1, group_columns(config, source)), is_symmetric)


def _values(scheme: Scheme) -> dict[str, Any]:
    columns = scheme.block[1]
    return {"bits": scheme.bits, "group_size": -1 if columns == ALL else columns, "sym": scheme.is_symmetric}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"
