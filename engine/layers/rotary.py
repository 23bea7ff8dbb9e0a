"""Rotary position tables: cosines and sines of every position, with all the ways to stretch them.

One table serves all requests, so stretching that depends on length (dynamic, longrope) is settled by the longest
sequence that may come, max_model_len: up to the length before stretching the frequencies are the plain or short ones,
as in transformers for such sequences; for more, those of max_model_len, from the first token on, as in vLLM.
"""

import math

import torch
from torch import Tensor

from engine.model_config import RopeConfig


def rotary_table(rope: RopeConfig | None, rotary_dim: int, max_model_len: int, device: torch.device) -> Tensor:
    """[max_model_len, rotary_dim] float32: cosines, then sines, of rotary_dim / 2 frequencies. None: turns nothing."""
    if rope is None:
        half = torch.ones(max_model_len, rotary_dim // 2, device=device)
        return torch.cat([half, torch.zeros_like(half)], dim=-1)
    positions = torch.arange(max_model_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies(rope, max_model_len).to(device))
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * rope.attention_factor


def frequencies(rope: RopeConfig, max_model_len: int) -> Tensor:
    """Radians a position, [rotary_dim / 2]."""
    theta, dim = rope.theta, rope.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if rope.kind == "dynamic" and max_model_len > rope.original_max_len:  # "NTK-aware": a larger base
        stretch = rope.factor * max_model_len / rope.original_max_len - (rope.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    if rope.kind == "longrope":
        factors = rope.long_factors if max_model_len > rope.original_max_len else rope.short_factors
        return 1.0 / (torch.tensor(factors) * theta**exponents)
    plain = 1.0 / theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return _yarn(plain, rope) if rope.kind == "yarn" else plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched, short ones kept, those between mixed by how many of them fit the original context."""
    waves = rope.original_max_len * plain / (2 * math.pi)  # in the original context
    kept = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: Tensor, rope: RopeConfig) -> Tensor:
    """arXiv 2309.00071, section 3.2: as llama3, but mixed by the index of the frequency."""

    def index_of(num_waves: float) -> float:
        return (rope.rotary_dim * math.log(rope.original_max_len / (num_waves * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(len(plain), dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)
