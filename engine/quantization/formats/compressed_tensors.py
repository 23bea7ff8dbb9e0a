"""The format `compressed-tensors`, of llm-compressor: integers and e4m3, in groups, rows, blocks or all together.

Tensors of a layer [out, in]; scales and zeros have the shape of the scheme's grid. Integers that inputs are multiplied
with as they are, are `pack-quantized`:
    weight_packed      int32 [out, in / 8]       packed along the inputs, 4 numbers of 8 bits or 8 of 4 bits a word
    weight_scale       the model's type
    weight_zero_point  int32 [out / 8, groups]   packed along the outputs, if there are zeros
    weight_shape       int64 [2]                 out, in
    weight_g_idx       int32 [in]                the group of each input, in checkpoints of before 2026
Weights for rounded inputs are `int-quantized` or `float-quantized`:
    weight             int8 or e4m3 [out, in]
    weight_scale       the model's type
    weight_zero_point  int8, if there are zeros
Inputs are rounded token by token: a scale or zero of theirs that is stored beside the weight is left aside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.quantization.formats.format import Get, block_sides, check_divides, group_columns, names_of, one_of
from engine.quantization.formats.gptq import stored_groups
from engine.quantization.packing import num_words, pack, unpack
from engine.quantization.weight import ALL, E4M3, QuantizedWeight, Scheme

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
LINEAR_CLASSES = ("Linear", "LinearBase")


@dataclass(frozen=True)
class Layers:
    """Layers of one scheme."""

    targets: tuple[str, ...]  # full names, regular expressions after `re:`, or a class of layers
    scheme: Scheme
    is_packed: bool
    has_groups_of: bool = False  # of inputs, in a tensor


@dataclass(frozen=True)
class CompressedTensors:
    layers: tuple[Layers, ...]
    ignored: tuple[str, ...] = ()  # as targets

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> CompressedTensors:
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense" or config.get("transform_config"):
            raise UserError(f"{source}: sparse weights and transforms of compressed-tensors are not supported")
        groups = config.get("config_groups") or {}
        if not groups:
            raise UserError(f"{source}: config_groups of its quantization is empty: it says not what is quantized")
        layers = tuple(_layers(group, config, source) for group in groups.values())
        return cls(layers, names_of(config, "ignore", source))

    @classmethod
    def make(cls, scheme: Scheme, act_order: bool, ignored: Sequence[str]) -> CompressedTensors:
        if scheme.rounds_inputs and scheme.bits == 4:
            raise UserError("4-bit integers are multiplied with inputs as they are, not with rounded ones")
        if act_order:
            raise UserError(
                "format compressed-tensors cannot say an activation order any more (its library gave it up in "
                "2026): leave out --desc-act, or add --format gptq"
            )
        is_packed = scheme.kind == "int" and not scheme.rounds_inputs
        return cls((Layers(("Linear",), scheme, is_packed),), ("lm_head", *ignored))

    def scheme_of(self, name: str) -> Scheme | None:
        layers = self._layers_of(name)
        return layers.scheme if layers else None

    def _layers_of(self, name: str) -> Layers | None:
        """Those with the narrowest target: the name itself, then an expression, then the class of all."""
        if any(_fit(name, target) for target in self.ignored):
            return None
        fits = [(_fit(name, target), layers) for layers in self.layers for target in layers.targets]
        fit, best = max(fits, key=lambda pair: pair[0])
        return best if fit else None

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight:
        layers = self._layers_of(name)
        assert layers is not None, f"{name} is not quantized"
        scheme, (out_features, in_features) = layers.scheme, shape
        grid = scheme.grid_shape(*shape)
        if layers.is_packed:
            packed = get(f"{name}.weight_packed", (out_features, num_words(in_features, scheme.bits)), torch.int32)
            numbers = unpack(packed, scheme.bits, in_features)
        else:
            numbers = get(f"{name}.weight", shape, E4M3 if scheme.kind == "float" else torch.int8)
        zeros = None
        if not scheme.is_symmetric and layers.is_packed:
            packed = get(f"{name}.weight_zero_point", (num_words(grid[0], scheme.bits), grid[1]), torch.int32)
            zeros = unpack(packed.T, scheme.bits, grid[0]).T.contiguous().to(torch.int16)
        elif not scheme.is_symmetric:
            zeros = get(f"{name}.weight_zero_point", grid, torch.int8).to(torch.int16)
        scales = get(f"{name}.weight_scale", grid, None)
        return QuantizedWeight(scheme, numbers, scales, zeros, self.group_of(name, in_features, get))

    def group_of(self, name: str, in_features: int, get: Get) -> Tensor | None:
        layers = self._layers_of(name)
        if layers is None or not layers.has_groups_of:
            return None
        return stored_groups(f"{name}.weight_g_idx", layers.scheme, in_features, get)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        rows, columns = self.layers[0].scheme.block
        check_divides(name, shape, outputs=rows or 1, inputs=columns or 1, format_name="compressed-tensors")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def write(self, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        layers = self._layers_of(name)
        assert layers is not None, f"{name} is not quantized"
        assert weight.group_of is None, f"{name} has an activation order"
        bits = weight.scheme.bits
        tensors = {"weight_scale": weight.scales.to(self.scale_dtype(dtype))}
        if layers.is_packed:
            tensors["weight_packed"] = pack(weight.numbers, bits)
            tensors["weight_shape"] = torch.tensor(weight.numbers.shape)
        else:
            tensors["weight"] = weight.numbers
        if weight.zeros is not None:
            zeros = weight.zeros.to(torch.int8)
            tensors["weight_zero_point"] = pack(zeros.T, bits).T if layers.is_packed else zeros
        return {f"{name}.{kind}": tensor.cpu().contiguous() for kind, tensor in tensors.items()}

    def config(self) -> dict[str, Any]:
        groups = {f"group_{i}": _config_group(layers) for i, layers in enumerate(self.layers)}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": list(self.ignored),
            "kv_cache_scheme": None,
        }


def _fit(name: str, target: str) -> int:
    """How narrowly a target fits a linear layer: 0 not at all, 3 by its name."""
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), name) else 0
    return 3 if target == name else 1 if target in LINEAR_CLASSES else 0


def _layers(group: dict[str, Any], config: dict[str, Any], source: Path) -> Layers:
    stored = group if group.get("format") else config
    is_packed = one_of(stored, "format", (PACKED, *PLAIN), None, source) == PACKED
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind = one_of(weights, "type", ("int",) if is_packed else ("int", "float"), "int", source)
    bits = one_of(weights, "num_bits", (4, 8) if kind == "int" else (8,), None, source)
    if inputs is not None:
        one_of(inputs, "type", (kind,), "int", source)
        one_of(inputs, "num_bits", (8,), None, source)
        one_of(weights, "num_bits", (8,), None, source)
    is_symmetric = one_of(weights, "symmetric", (True, False) if kind == "int" else (True,), True, source)
    scheme = Scheme(kind, bits, _block(weights, source), is_symmetric, inputs is not None)
    has_groups_of = weights.get("actorder") in (True, "group", "dynamic")
    return Layers(names_of(group, "targets", source), scheme, is_packed, has_groups_of)


def _block(weights: dict[str, Any], source: Path) -> tuple[int, int]:
    columns = group_columns(weights, source)
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if columns == ALL else "group"
    strategy = one_of(weights, "strategy", ("tensor", "channel", "group", "block"), implied, source)
    if strategy == "block":
        return block_sides(weights, "block_structure", source)
    return {"tensor": (ALL, ALL), "channel": (1, ALL), "group": (1, columns)}[strategy]


def _config_group(layers: Layers) -> dict[str, Any]:
    scheme, (rows, columns) = layers.scheme, layers.scheme.block
    strategies = {(1, columns): "group", (1, ALL): "channel", (ALL, ALL): "tensor"}  # the later of equal keys
    strategy = strategies.get(scheme.block, "block")
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.is_symmetric,
        "strategy": strategy,
        "group_size": columns if strategy == "group" else None,
        "block_structure": [rows, columns] if strategy == "block" else None,
        "dynamic": False,
        "actorder": "group" if layers.has_groups_of else None,
    }
    # Blocks go with inputs that have a scale for each group of as many numbers, to those who can run nothing else.
    inputs = {
        "num_bits": 8,
        "type": scheme.kind,
        "symmetric": True,
        "strategy": "group" if strategy == "block" else "token",
        "group_size": columns if strategy == "block" else None,
        "dynamic": True,
    }
    return {
        "targets": list(layers.targets),
        "weights": weights,
        "input_activations": inputs if scheme.rounds_inputs else None,
        "output_activations": None,
        "format": PACKED if layers.is_packed else f"{scheme.kind}-quantized",
    }
