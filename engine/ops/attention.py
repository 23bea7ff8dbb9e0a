"""Attention over the paged KV cache: decodes, prefill chunks and any mix of both in one call."""

from torch import Tensor

from engine.batch import ForwardBatch
from engine.ops.dispatch import body


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(cap(q · Kᵀ · scale)) · V for each query over the tokens of its own request up to itself.

    q, result [T, num_heads, head_dim]; caches [num_blocks, num_kv_heads, block_size, head_dim]; a query head uses the
    KV head num_kv_heads · head // num_heads. window > 0: a query sees the last `window` tokens, itself included.
    softcap > 0: cap(s) = softcap · tanh(s / softcap).
    """
    return body(q).paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
