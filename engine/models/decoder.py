"""What all our models are: an embedding, layers that add to a residual stream, a last norm, and logits.

A family gives the layer (`layer_class`) and says what its norms and names do differently.
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint
from engine.layers.attention import Attention
from engine.layers.embedding import VocabEmbedding
from engine.layers.mlp import MLP
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.layers.rotary import rotary_table
from engine.model_config import ModelConfig, RopeConfig


class DecoderLayer(Protocol):
    input_norm: RMSNorm  # makes what goes into the attention's projections
    attention: Attention
    pre_mlp_norm: RMSNorm  # makes what goes into the MLP
    mlp: MLP

    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, placement: Placement) -> None: ...

    def load(self, ckpt: Checkpoint) -> None: ...

    def attend(self, x: Tensor, residual: Tensor, batch: ForwardBatch) -> Tensor:
        """Adds x, what the layer before it made, to the residual, in place. Returns what the heads found."""

    def transform(self, heads: Tensor, residual: Tensor) -> Tensor:
        """The rest of the layer, token by token. Adds to the residual, in place. Returns what the layer makes."""


class Model:
    """A decoder-only transformer, this rank's share of it. The caller sets torch.inference_mode."""

    layer_class: ClassVar[type[DecoderLayer]]
    norm_offset: ClassVar[float] = 0.0
    prefixes: ClassVar[tuple[str, ...]] = ("model",)  # of the names in the checkpoint; the first that is there

    def __init__(self, config: ModelConfig, max_model_len: int, placement: Placement) -> None:
        self.config = config
        self.embedding = VocabEmbedding("embed_tokens", config.vocab_size, config.hidden_size, placement)
        tables: dict[RopeConfig | None, Tensor] = {}
        for rope in config.layer_ropes:
            if rope not in tables:
                rotary_dim = rope.rotary_dim if rope else config.head_dim
                tables[rope] = rotary_table(rope, rotary_dim, max_model_len, placement.device)
        self.layers = [
            self.layer_class(config, i, tables[rope], placement) for i, rope in enumerate(config.layer_ropes)
        ]
        self.norm = RMSNorm("norm", config.hidden_size, config.rms_norm_eps, placement, self.norm_offset)
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = VocabEmbedding("lm_head", config.vocab_size, config.hidden_size, placement)
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=placement.dtype).item()

    @property
    def attentions(self) -> list[Attention]:
        return [layer.attention for layer in self.layers]

    def load(self, ckpt: Checkpoint) -> None:
        self.load_embedding(ckpt)
        for i in range(len(self.layers)):
            self.load_layer(i, ckpt)
        self.load_head(ckpt)

    def load_embedding(self, ckpt: Checkpoint) -> None:
        self.embedding.load(self._stem(ckpt))

    def load_layer(self, layer: int, ckpt: Checkpoint) -> None:
        self.layers[layer].load(self._stem(ckpt).scope(f"layers.{layer}"))

    def load_head(self, ckpt: Checkpoint) -> None:
        """The last norm, and the head where it is not the embedding again."""
        self.norm.load(self._stem(ckpt))
        if self.lm_head is not self.embedding:
            self.lm_head.load(ckpt)

    def _stem(self, ckpt: Checkpoint) -> Checkpoint:
        return ckpt.scope(next((name for name in self.prefixes if ckpt.has(f"{name}.norm.weight")), self.prefixes[0]))

    def embed(self, token_ids: Tensor) -> Tensor:
        """What the first layer gets, [T, hidden_size]."""
        x = self.embedding(token_ids)
        return x * self.embedding_scale if self.embedding_scale != 1.0 else x

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The hidden states after the last norm, [S, hidden_size], of the tokens that the batch wants them of."""
        x = self.embed(batch.token_ids)
        residual = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            heads = layer.attend(x, residual, batch)
            if batch.wanted is not None and i == len(self.layers) - 1:
                # The rest of a prompt is in the cache now; nobody asks for its last hidden states.
                heads, residual = heads.index_select(0, batch.wanted), residual.index_select(0, batch.wanted)
            x = layer.transform(heads, residual)
        return self.norm.add(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] float32 of hidden states [n, hidden_size]."""
        logits = self.lm_head.logits(hidden)
        cap = self.config.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
