"""How checkpoints store quantized weights: each format one file, that reads it, writes it and says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.quantization.formats.awq import AWQ
from engine.quantization.formats.compressed_tensors import CompressedTensors
from engine.quantization.formats.fine_grained_fp8 import FineGrainedFP8
from engine.quantization.formats.format import Format, Get, describe
from engine.quantization.formats.gptq import GPTQ
from engine.quantization.weight import Scheme

__all__ = ["FORMATS", "Format", "Get", "describe", "make_format", "read_format"]

WRITTEN: dict[str, type[Format]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
    "fp8": FineGrainedFP8,
}
FORMATS: dict[str, type[Format]] = {**WRITTEN, "fbgemm_fp8": FineGrainedFP8}  # by quant_method


def read_format(config: dict[str, Any], source: Path) -> Format:
    """The format that a config's `quantization_config` describes; source: the config's file. Raises UserError."""
    method = config.get("quant_method")
    if method not in FORMATS:
        raise UserError(
            f"{source}: weights quantized by {method!r} are not supported; supported: {', '.join(FORMATS)}. "
            "Use the unquantized model (vcli quantize makes any of these of it)"
        )
    return FORMATS[method].from_config(config, source)


def make_format(name: str, scheme: Scheme, *, act_order: bool = False, ignored: Sequence[str] = ()) -> Format:
    """The format to write a checkpoint in whose linear layers, without those ignored and lm_head, have one scheme.

    act_order: groups hold inputs from anywhere (QuantizedWeight.group_of). Raises UserError, with the way out, for what
    the format cannot say.
    """
    if name not in WRITTEN:
        raise UserError(f"format {name!r} is not known: choose one of {', '.join(WRITTEN)}")
    return WRITTEN[name].make(scheme, act_order, ignored)
