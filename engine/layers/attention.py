"""Causal attention over the paged KV cache, heads split over the ranks."""

import torch
from torch import Tensor

from engine import ops
from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.model_config import ModelConfig
from engine.ops import Activations


class Attention:
    """Projections, rotation and attention of one layer. Its two caches are given to it once memory is known."""

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, placement: Placement, norm_offset: float = 0.0
    ) -> None:
        self.head_dim = config.head_dim
        self.num_kv_heads = placement.share(config.num_kv_heads)
        self.window = config.layer_windows[layer]
        self.scale, self.softcap, self.eps = config.attention_scale, config.attention_softcap, config.rms_norm_eps
        self.cos_sin = cos_sin
        self.k_cache = self.v_cache = torch.empty(0)  # [num_blocks, num_kv_heads, block_size, head_dim]

        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, parts, config.qkv_bias, placement, "qkv_proj")
        self.o_proj = RowParallelLinear("o_proj", q_size, config.hidden_size, config.o_bias, placement)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.has_qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(name, config.head_dim, self.eps, placement, norm_offset) for name in ("q_norm", "k_norm")
            )

    def load(self, ckpt: Checkpoint) -> None:
        self.qkv_proj.load(ckpt)
        self.o_proj.load(ckpt)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.load(ckpt)

    def __call__(self, x: Activations, batch: ForwardBatch) -> Tensor:
        """What the heads of each token found, [T, num_heads * head_dim]; `o_proj` makes hidden states of it."""
        q = ops.rotate_and_store(
            self.qkv_proj(x),
            batch.positions,
            batch.slot_mapping,
            self.cos_sin,
            self.k_cache,
            self.v_cache,
            self.q_norm.weight if self.q_norm else None,
            self.k_norm.weight if self.k_norm else None,
            self.eps,
        )  # [T, num_heads, head_dim]
        out = ops.paged_attention(q, self.k_cache, self.v_cache, batch, self.scale, self.window, self.softcap)
        return out.flatten(1)
