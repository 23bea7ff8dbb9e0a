"""Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (arXiv 2503.19786).

Each half of a layer has a norm before and after it, all norms multiply by 1 + w, and embeddings are scaled. Soft caps
(2), norms of queries and keys (3) and the alternation of windowed and full attention are said by ModelConfig.
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

NORM_OFFSET = 1.0


class GemmaLayer:
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x)))"""

    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, placement: Placement) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(name, config.hidden_size, config.rms_norm_eps, placement, NORM_OFFSET)

        self.input_norm = norm("input_layernorm")
        self.attention = Attention(config, layer, cos_sin, placement, NORM_OFFSET)
        self.post_attention_norm = norm("post_attention_layernorm")
        self.pre_mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = MLP(config, placement)
        self.post_mlp_norm = norm("post_feedforward_layernorm")

    def load(self, ckpt: Checkpoint) -> None:
        self.attention.load(ckpt.scope("self_attn"))
        self.mlp.load(ckpt.scope("mlp"))
        for norm in (self.input_norm, self.post_attention_norm, self.pre_mlp_norm, self.post_mlp_norm):
            norm.load(ckpt)

    def attend(self, x: Tensor, residual: Tensor, batch: ForwardBatch) -> Tensor:
        inputs = self.attention.qkv_proj.weight.inputs_of(self.input_norm, x, residual)
        return self.attention(inputs, batch)

    def transform(self, heads: Tensor, residual: Tensor) -> Tensor:
        x = self.post_attention_norm(self.attention.o_proj(heads))
        inputs = self.mlp.gate_up_proj.weight.inputs_of(self.pre_mlp_norm, x, residual)
        return self.post_mlp_norm(self.mlp(inputs))


class Gemma(Model):
    layer_class = GemmaLayer
    norm_offset = NORM_OFFSET
    prefixes = ("model", "language_model.model", "model.language_model")
