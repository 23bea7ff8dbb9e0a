"""Scales of a product's inputs are taken back by what makes them: a norm, or rows of a product before it.

norm → q, k, v and norm → gate, up: the norm's weight. up → down and v → o: rows of the weight, and their bias, as these
inputs are linear in them; heads of the attention that share a value head share its scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.models.decoder import DecoderLayer
from engine.products import Product
from engine.quantization.weight import QuantizedWeight


class Maker(Protocol):
    """What makes the inputs of a product."""

    @property
    def has_copies(self) -> bool:
        """Whether some inputs are the same numbers, mixed otherwise, and can only be divided by the same."""

    def tie(self, values: Tensor) -> Tensor:
        """Inputs that it cannot tell apart get the largest of their values [in]."""

    def divide(self, scales: Tensor) -> Tensor:
        """Have it make inputs divided by scales [in] from now on. Returns what they are divided by in fact."""


@dataclass(frozen=True)
class NormMaker:
    norm: RMSNorm
    dtype: torch.dtype  # that its weight is stored in
    has_copies = False

    def tie(self, values: Tensor) -> Tensor:
        return values

    def divide(self, scales: Tensor) -> Tensor:
        before, offset = self.norm.weight.clone(), self.norm.offset
        after = (before / scales - offset).to(self.dtype).float() + offset
        after = torch.where(after == 0, before, after)  # what became too small to be stored stays
        self.norm.weight.copy_(after)
        return torch.where(after == 0, 1.0, before / after)


@dataclass(frozen=True)
class RowsMaker:
    product: Product
    rows: slice  # of its weight
    solved: dict[str, QuantizedWeight]  # those that are quantized already, by name; the others are changed in place
    head_dim: int  # rows in a head
    num_copies: int = 1  # of each head: so many heads of the attention share it

    @property
    def has_copies(self) -> bool:
        return self.num_copies > 1

    def tie(self, values: Tensor) -> Tensor:
        heads = values.unflatten(0, (-1, self.num_copies, self.head_dim))
        return heads.amax(1, keepdim=True).expand_as(heads).flatten()

    def divide(self, scales: Tensor) -> Tensor:
        wanted = scales
        scales = scales.unflatten(0, (-1, self.num_copies, self.head_dim))[:, 0].flatten()
        for name, rows in self.product.rows.items():
            first, last = max(rows.start, self.rows.start), min(rows.stop, self.rows.stop)
            if first >= last:
                continue
            divisors = scales[first - self.rows.start : last - self.rows.start].unsqueeze(1)
            if name in self.solved:
                weight = self.solved[name]
                grid = weight.scales.clone()
                grid[first - rows.start : last - rows.start] /= divisors
                self.solved[name] = replace(weight, scales=grid)
            else:
                self.product.weight[first:last] /= divisors
        if self.product.linear.bias is not None:
            self.product.linear.bias[self.rows] /= scales
        return wanted


def find_makers(
    layer: DecoderLayer, products: Sequence[Product], solved: dict[str, QuantizedWeight], dtype: torch.dtype
) -> dict[ColumnParallelLinear | RowParallelLinear, Maker]:
    """What makes the inputs of each of a layer's products.

    dtype: of the weights that are stored unquantized.
    """
    by_linear = {product.linear: product for product in products}
    attention, mlp = layer.attention, layer.mlp
    qkv, gate_up = attention.qkv_proj, mlp.gate_up_proj
    inner = sum(gate_up.shares) // 2
    q_size, _, v_size = qkv.shares
    values, up = slice(sum(qkv.shares) - v_size, sum(qkv.shares)), slice(inner, 2 * inner)
    num_copies = q_size // v_size
    return {
        qkv: NormMaker(layer.input_norm, dtype),
        attention.o_proj: RowsMaker(by_linear[qkv], values, solved, attention.head_dim, num_copies),
        gate_up: NormMaker(layer.pre_mlp_norm, dtype),
        mlp.down_proj: RowsMaker(by_linear[gate_up], up, solved, head_dim=1),
    }
