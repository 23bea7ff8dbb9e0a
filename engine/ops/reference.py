"""Every op in plain torch, written for clarity: the oracle of the tests and the body that runs anywhere."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch
from engine.ops import sampling_line
from engine.ops.activations import Activations, RoundedRows
from engine.ops.grouped import GroupedWeight
from engine.ops.sampling_line import OUT_OF_REACH, STEPS_PER_NAT, Line

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

TILE_NUMBERS = 1 << 20  # of a quantized weight, worked out at a time


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


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return gated_activation(linear(x, weight, bias), kind)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().t()


def empty_grouped(
    out_features: int, in_features: int, bits: int, group_size: int, has_zeros: bool, empty: Callable[..., Tensor]
) -> GroupedWeight:
    groups = in_features // group_size
    return GroupedWeight(
        out_features,
        bits,
        group_size,
        empty(out_features, in_features * bits // 8, dtype=torch.uint8),
        empty(out_features, groups, dtype=torch.float32),
        empty(out_features, groups, dtype=torch.int16) if has_zeros else None,
    )


def put_grouped(weight: GroupedWeight, first_row: int, numbers: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    rows = slice(first_row, first_row + len(numbers))
    packed = (numbers + (1 << weight.bits - 1)).to(torch.uint8) if weight.bits == 4 else numbers.view(torch.uint8)
    if weight.bits == 4:  # the two halves of a row in the two halves of its bytes
        low, high = packed.chunk(2, dim=1)
        packed = low | high << 4
    weight.packed[rows] = packed.to(weight.packed.device)
    weight.scales[rows] = scales.to(weight.scales.device, weight.scales.dtype)
    if weight.zeros is not None:
        weight.zeros[rows] = 0 if zeros is None else zeros.to(weight.zeros.device)


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    return by_tiles(x, weight.out_features, lambda rows: _dequantize(weight, rows).to(x.dtype), bias)


def grouped_gated_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, kind: str) -> Tensor:
    return gated_activation(grouped_linear(x, weight, bias), kind)


def _dequantize(weight: GroupedWeight, rows: slice) -> Tensor:
    """Rows of a weight in groups, [rows, in] float32."""
    packed = weight.packed[rows]
    numbers = torch.cat([packed & 15, packed >> 4], dim=1).float() - 8 if weight.bits == 4 else packed.view(torch.int8)
    groups = numbers.unflatten(1, (-1, weight.group_size)).float()
    if weight.zeros is not None:
        groups = groups - weight.zeros[rows].unsqueeze(2)
    return (groups * weight.scales[rows].unsqueeze(2)).flatten(1)


def add_rms_norm_rounded(x: Tensor, residual: Tensor, weight: Tensor, eps: float, stored: torch.dtype) -> RoundedRows:
    return round_inputs(add_rms_norm(x, residual, weight, eps), stored)


def rounded_linear(x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    rows = x if isinstance(x, RoundedRows) else round_inputs(x, numbers.dtype)
    if numbers.dtype == torch.int8:
        y = _int_product(rows.numbers, numbers).float() * scales
    else:
        y = by_tiles(rows.numbers.float(), len(numbers), lambda rows: numbers[rows].float(), None) * scales
    y = y * rows.scales.unsqueeze(1)
    return (y if bias is None else y + bias).to(rows.dtype)


def rounded_gated_linear(
    x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None
) -> Activations:
    y = gated_activation(rounded_linear(x, numbers, scales, bias), kind)
    return y if rounds_to is None else round_inputs(y, rounds_to)


def blockwise_linear(
    x: Tensor, numbers: Tensor, scales: Tensor, block: tuple[int, int], rounds_inputs: bool, bias: Tensor | None
) -> Tensor:
    (block_rows, block_columns), in_features = block, x.shape[1]
    wide = x.float()
    if rounds_inputs:
        padded = F.pad(wide, (0, -in_features % block_columns)).unflatten(1, (-1, block_columns))
        rounded, x_scales = round_rows(padded, numbers.dtype)
        wide = (rounded.float() * x_scales).flatten(1)[:, :in_features]

    def tile(rows: slice) -> Tensor:
        lines = torch.arange(rows.start, rows.stop, device=x.device) // block_rows
        return numbers[rows].float() * scales[lines].repeat_interleave(block_columns, 1)[:, :in_features]

    y = by_tiles(wide, len(numbers), tile, None)
    return (y if bias is None else y + bias).to(x.dtype)


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors x [..., dim] float32 as int8 or e4m3, and the scale of each, [..., 1]. One of zeros has a scale too."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # By a tensor: PyTorch multiplies on a GPU with the inverse of a plain number, which can be another scale.
    scales = (x.abs().amax(-1, keepdim=True) / x.new_full((), largest)).clamp(min=torch.finfo(torch.float32).tiny)
    steps = x / scales
    return (steps.round() if dtype == torch.int8 else steps.clamp(-largest, largest)).to(dtype), scales


def round_inputs(x: Tensor, dtype: torch.dtype) -> RoundedRows:
    """x [rows, dim] for a product with a weight of this type."""
    numbers, scales = round_rows(x.float(), dtype)
    return RoundedRows(numbers, scales.squeeze(1), x.dtype)


def _int_product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in int32, of int8. cuBLAS takes more than 16 rows only, and eights of them."""
    if not x.is_cuda:
        return torch._int_mm(x, weight.t())
    padded = F.pad(x, (0, 0, 0, max(24, -(-len(x) // 8) * 8) - len(x)))
    return torch._int_mm(padded, weight.t())[: len(x)]


def rows_of_a_tile(in_features: int) -> int:
    return max(1, TILE_NUMBERS // in_features)


def by_tiles(
    x: Tensor, out_features: int, tile: Callable[[slice], Tensor], bias: Tensor | None, product: Product = linear
) -> Tensor:
    """x · Wᵀ + bias of a W that `tile` makes some rows of at a time, so that there never is all of it."""
    step = rows_of_a_tile(x.shape[1])
    if step >= out_features:
        return product(x, tile(slice(0, out_features)), bias)
    y = x.new_empty(len(x), out_features)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        y[:, rows] = product(x, tile(rows), None if bias is None else bias[rows])
    return y


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


def add_gumbel_noise(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return logits + gumbel_noise(seeds, positions, logits.shape[-1])


def best_of(logits: Tensor) -> Tensor:
    return logits.argmax(-1).int()


def take_best(
    logits: Tensor,
    rows: Tensor,
    ends: Tensor,
    token_ids: Tensor,
    best_of: Callable[[Tensor], Tensor] = best_of,
) -> Tensor:
    return _put(_unless_invalid(best_of(logits), logits), rows, ends, token_ids)


def sample(
    logits: Tensor,
    lines: Tensor,
    rows: Tensor,
    ends: Tensor,
    token_ids: Tensor,
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor] = add_gumbel_noise,
    best_of: Callable[[Tensor], Tensor] = best_of,
) -> Tensor:
    all_lines = [sampling_line.unpack(words) for words in lines[rows.long()].cpu().numpy()]
    for i, (line, row, end) in enumerate(zip(all_lines, rows.tolist(), ends.tolist(), strict=True)):
        if line.changes_logits:
            change_logits(logits[i], line, token_ids[row, :end])
    tokens = _unless_invalid(best_of(logits), logits)
    is_drawn = [bool(line.header["inverse_temperature"]) for line in all_lines]
    if any(is_drawn):
        drawn = torch.tensor(is_drawn, device=logits.device).nonzero().squeeze(-1)
        drawn_lines = [line for line in all_lines if line.header["inverse_temperature"]]
        seeds = torch.tensor([int(line.header["seed"]) for line in drawn_lines], device=logits.device)
        noisy = add_noise(keep_best(logits[drawn], drawn_lines), seeds, ends[drawn])
        tokens[drawn] = torch.where(tokens[drawn] < 0, -1, best_of(noisy))
    return _put(tokens, rows, ends, token_ids)


def mask_logits(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    device = words.device
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    change_of_byte = torch.where(bits == 1, 0.0, -torch.inf)  # [256, 8]
    changes = change_of_byte.index_select(0, words.view(torch.uint8).flatten().int()).view(len(words), -1)
    logits.index_add_(0, rows, changes[:, : logits.shape[1]])


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = token_ids.long().clamp(min=0).unsqueeze(-1)
    wide = logits.log_softmax(-1)
    top_values, top_ids = wide.topk(num_top, dim=-1)
    return wide.gather(-1, index).squeeze(-1), (logits > logits.gather(-1, index)).sum(-1) + 1, top_values, top_ids


def _unless_invalid(best: Tensor, logits: Tensor) -> Tensor:
    """The best tokens [n], -1 for rows that have none: NaN counts as the largest number."""
    values = logits.gather(-1, best.long().unsqueeze(-1)).squeeze(-1)
    return torch.where(values.isfinite(), best, -1)


def _put(tokens: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    fits = ends < token_ids.shape[1]
    token_ids[rows[fits].long(), ends[fits].long()] = tokens[fits].clamp(min=0)
    return tokens


def change_logits(logits: Tensor, line: Line, history: Tensor) -> None:
    """Apply logit_bias, min_tokens and the penalties of one row, in place.   logits [vocab], history [num_tokens]"""
    header, num_prompt_tokens = line.header, int(line.header["num_prompt_tokens"])
    if len(line.biased):
        biased, biases = (torch.from_numpy(part).to(logits.device) for part in (line.biased.astype(int), line.biases))
        logits[biased] += biases
    if len(history) - num_prompt_tokens < header["min_tokens"]:
        logits[torch.from_numpy(line.forbidden.astype(int)).to(logits.device)] = -torch.inf
    if header["has_penalties"]:
        seen = history.long().unique()
        values, repetition = logits[seen], float(header["repetition_penalty"])
        logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
        counts = torch.bincount(history[num_prompt_tokens:].long(), minlength=len(logits)).float()
        frequency, presence = float(header["frequency_penalty"]), float(header["presence_penalty"])
        logits -= frequency * counts + presence * (counts > 0)


def keep_best(logits: Tensor, lines: list[Line]) -> Tensor:
    """logits [n, vocab] over temperature, -inf where min_p, top_k or top_p drops a token."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([line.header[name].item() for line in lines], dtype=dtype, device=logits.device)[:, None]

    scaled = logits * column("inverse_temperature", torch.float32)
    behind = (scaled.amax(-1, keepdim=True) - scaled) * STEPS_PER_NAT
    steps = behind.clamp_max(OUT_OF_REACH).int()
    limit = column("max_steps", torch.int32)
    top_k, top_p = column("top_k", torch.int64), column("top_p", torch.float64)
    most = min(int(top_k.max()), logits.shape[-1])
    if most:
        best = steps.topk(most, dim=-1, largest=False).values
        worst = best.gather(-1, top_k.clamp(1, most) - 1)
        limit = torch.where((top_k > 0) & (top_k <= most), torch.minimum(limit, worst), limit)
    if (top_p < 1).any():
        limit = torch.where(top_p < 1, _limit_of_mass(steps, limit, top_p), limit)
    return scaled.masked_fill(steps > limit, -torch.inf)


def _limit_of_mass(steps: Tensor, limit: Tensor, top_p: Tensor) -> Tensor:
    """The fewest steps within which lies top_p of the mass that lies within limit; all but the first [n, 1].

    No sort: bisection over the steps.
    """
    mass = (-steps.double() / STEPS_PER_NAT).exp().masked_fill(steps > limit, 0.0)
    target = top_p * mass.sum(-1, keepdim=True)
    low, high = torch.full_like(limit, -1), limit  # the mass within `high` is enough, within `low` not
    for _ in range(OUT_OF_REACH.bit_length()):
        middle = low + (high - low) // 2
        is_enough = mass.masked_fill(steps > middle, 0.0).sum(-1, keepdim=True) >= target
        low, high = torch.where(is_enough, low, middle), torch.where(is_enough, middle, high)
    return high


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits of factor * x, both below 2**32 (in int64, which the whole product would overflow)."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)  # each below 2**48
    total = low + ((high & 0xFFFF) << 16)  # below 2**49
    return total & 0xFFFFFFFF, ((total >> 32) + (high >> 16)) & 0xFFFFFFFF
