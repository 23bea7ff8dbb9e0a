"""Llama (arXiv 2302.13971, 2407.21783) and those built like it: Mistral, Qwen2, Qwen3, Phi-3, SmolLM.

What sets them apart (biases, windows, norms of queries and keys, rotary scaling) is said by ModelConfig.
"""

from torch import Tensor

from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint
from engine.layers.attention import Attention
from engine.layers.mlp import MLP
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.model_config import ModelConfig
from engine.models.decoder import Model


class LlamaLayer:
    """x += attention(norm(x)); x += mlp(norm(x))"""

    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, placement: Placement) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm("input_layernorm", dim, eps, placement)
        self.attention = Attention(config, layer, cos_sin, placement)
        self.pre_mlp_norm = RMSNorm("post_attention_layernorm", dim, eps, placement)
        self.mlp = MLP(config, placement)

    def load(self, ckpt: Checkpoint) -> None:
        self.input_norm.load(ckpt)
        self.attention.load(ckpt.scope("self_attn"))
        self.pre_mlp_norm.load(ckpt)
        self.mlp.load(ckpt.scope("mlp"))

    def attend(self, x: Tensor, residual: Tensor, batch: ForwardBatch) -> Tensor:
        inputs = self.attention.qkv_proj.weight.inputs_of(self.input_norm, x, residual)
        return self.attention(inputs, batch)

    def transform(self, heads: Tensor, residual: Tensor) -> Tensor:
        x = self.attention.o_proj(heads)
        return self.mlp(self.mlp.gate_up_proj.weight.inputs_of(self.pre_mlp_norm, x, residual))


class Llama(Model):
    layer_class = LlamaLayer
