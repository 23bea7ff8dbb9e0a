"""From the QKV projection to rotated queries and stored keys and values, in one pass."""

from torch import Tensor

from engine.ops.dispatch import body


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm (if given) and rotate queries and keys, write keys and values to their slots, return the queries.

    qkv [T, (num_heads + 2 · num_kv_heads) · head_dim]: queries, keys, values; positions, slot_mapping [T] int32;
    cos_sin [max_positions, rotary_dim] float32: cosines, then sines, of rotary_dim / 2 frequencies (pairs lie
    rotary_dim / 2 apart, as in Hugging Face models); caches [num_blocks, num_kv_heads, block_size, head_dim],
    of float8_e4m3fn or qkv's type; what is beyond their range is clipped; q_norm, k_norm [head_dim]; result
    [T, num_heads, head_dim].
    """
    return body(qkv).rotate_and_store(qkv, positions, slot_mapping, cos_sin, k_cache, v_cache, q_norm, k_norm, eps)
