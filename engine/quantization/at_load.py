"""What the weights of linear layers become on the way in: what the checkpoint holds, or plain ones rounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import LinearFormat
from engine.errors import UserError
from engine.model_config import ModelConfig
from engine.quantization.formats import read_format
from engine.quantization.formats.format import Get
from engine.quantization.weight import ALL, QuantizedWeight, Scheme, round_to_nearest

SCHEMES = {  # by --quantization
    "fp8": Scheme("float", 8, (1, ALL), rounds_inputs=True),
    "int8": Scheme("int", 8, (1, ALL), rounds_inputs=True),
}
LINEAR_LAYERS = (  # of a layer, and several of them in one
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj")),
)
ROWS_AT_A_TIME = 1024  # rounding takes several times the memory of what is rounded


def find_format(config: ModelConfig, quantization: str, path: Path) -> LinearFormat | None:
    """How to read the linear layers of the model at `path`; quantization: auto, or one of SCHEMES for plain weights.

    None: as they are. Raises UserError.
    """
    if quantization == "auto":
        return read_format(dict(config.quantization), path) if config.quantization else None
    if config.quantization:
        method = config.quantization.get("quant_method")
        raise UserError(f"--quantization {quantization}: {path} is quantized already ({method}): leave the flag out")
    return RoundedAtLoad(SCHEMES[quantization])


def scheme_of_layers(config: ModelConfig, quantization: str, path: Path) -> Scheme | None:
    """What the weights of such a model's layers are; where they differ, those of the first layer's MLP."""
    form = find_format(config, quantization, path)
    return form.scheme_of("model.layers.0.mlp.down_proj") if form else None


def schemes_of_layers(form: LinearFormat, num_layers: int) -> list[Scheme]:
    """All kinds of weights in a model's layers: a checkpoint may have several, and leave some layers as they are."""
    names = (f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in LINEAR_LAYERS)
    return list(dict.fromkeys(scheme for scheme in map(form.scheme_of, names) if scheme is not None))


@dataclass(frozen=True)
class RoundedAtLoad:
    """Plain weights of linear layers, rounded to the nearest while they are read."""

    scheme: Scheme

    def scheme_of(self, name: str) -> Scheme | None:
        return None if name == "lm_head" else self.scheme

    def group_of(self, name: str, in_features: int, get: Get) -> None:
        return None

    def read(self, name: str, shape: tuple[int, int], get: Get) -> QuantizedWeight:
        parts = get(f"{name}.weight", shape, None).split(ROWS_AT_A_TIME)
        rounded = [round_to_nearest(part, self.scheme) for part in parts]
        numbers, scales = (torch.cat([getattr(part, kind) for part in rounded]) for kind in ("numbers", "scales"))
        return QuantizedWeight(self.scheme, numbers, scales)
