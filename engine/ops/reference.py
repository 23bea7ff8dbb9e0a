"""Every op in plain torch, written for clarity: the oracle of the tests and the body that runs anywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm(residual, weight, eps)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().t()


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    q = rms_norm(q, q_norm, eps) if q_norm is not None else q
    k = rms_norm(k, k_norm, eps) if k_norm is not None else k
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2] each
    slots = slot_mapping.long()
    block, offset = slots // block_size, slots % block_size
    limit = torch.finfo(k_cache.dtype).max  # what is beyond a narrow cache's range is clipped
    k_cache[block, :, offset] = _rotate(k, cos, sin).clamp(-limit, limit).to(k_cache.dtype)
    v_cache[block, :, offset] = v.clamp(-limit, limit).to(v_cache.dtype)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + rotary_dim / 2]); what lies past rotary_dim stays as it is."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch, scale: float, window: int, softcap: float
) -> Tensor:
    out = torch.empty_like(q)
    num_kv_heads = k_cache.shape[1]
    starts, contexts, rows = batch.query_start.tolist(), batch.context_lens.tolist(), batch.rows.tolist()
    for i, (context, row) in enumerate(zip(contexts, rows, strict=True)):
        query = q[starts[i] : starts[i + 1]]  # [query_len, num_heads, head_dim]
        blocks = batch.block_table[row, : -(-context // k_cache.shape[2])].long()
        k, v = (cache[blocks].transpose(1, 2).flatten(0, 1)[:context].to(q.dtype) for cache in (k_cache, v_cache))
        groups = q.shape[1] // num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query.float(), k.float()) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(context - len(query), context, device=q.device).unsqueeze(1)
        key = torch.arange(context, device=q.device).unsqueeze(0)
        visible = (key <= position) & ((position - key < window) if window else True)
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", probabilities, v.float()).to(q.dtype)
    return out


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter (token_id / 4,
    0, position, 0), key seed; word token_id % 4 becomes u in (0, 1) and the noise -log(-log(u))."""
    mask = 0xFFFFFFFF
    counter = torch.arange(-(-vocab_size // 4), device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter, zero, positions.long().unsqueeze(1) & mask, zero
    key0, key1 = (seeds & mask).unsqueeze(1), ((seeds >> 32) & mask).unsqueeze(1)
    for _ in range(10):
        low0, high0 = _multiply(0xD2511F53, c0)
        low1, high1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23  # 24 bits would round up to 1, whose noise is infinite
    return -torch.log(-torch.log(uniform))


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits of factor * x, both below 2**32 (in int64, which the whole product would overflow)."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)  # each below 2**48
    total = low + ((high & 0xFFFF) << 16)  # below 2**49
    return total & 0xFFFFFFFF, ((total >> 32) + (high >> 16)) & 0xFFFFFFFF
