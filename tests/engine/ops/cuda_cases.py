"""Random inputs for each op and its result in float64, for the CUDA kernels on a GPU or emulated.

Inputs and results are made on the case's own device, by PyTorch alone: on a GPU that is what keeps the tests short.
Each case calls the CUDA body and compares row by row. What a kernel must not read is NaN (cache slots outside the
contexts), what it must not follow leads far out of bounds (block table entries past the context), and what it must
write is NaN before (`poisoned`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE
from engine.ops import cuda, reference, sampling_line
from engine.ops.activations import RoundedRows
from engine.ops.cuda import rounding
from engine.ops.cuda.gemm import GATED_FORMS, Tiling
from engine.ops.cuda.grouped_weight import PackedWeight, empty, put
from engine.quantization.weight import Scheme, round_to_nearest
from engine.sampling_params import SamplingParams

# ‖out - expected‖ / ‖expected‖ of a row
# e4m3 has 3 bits of fraction: half of the last is 1/16 of the number at most.
TOLERANCE = {torch.float8_e4m3fn: 1 / 16, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 5e-5}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and its kin give NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def assert_rows_close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    out, expected = out.double(), expected.double()
    error = (out - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    worst = error.flatten().argmax()
    assert torch.isfinite(out).all(), f"not finite at {(~torch.isfinite(out)).nonzero()[:8].tolist()}"
    assert error.max() < TOLERANCE[dtype], f"row {worst} of {tuple(error.shape)}: {error.max():.2e}"


def check_norms(device: str, dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, dim: int) -> None:
    x, weight = random(rows, dim, device=device, dtype=dtype), random(dim, device=device, dtype=weight_dtype)
    residual = random(rows, dim, device=device, dtype=dtype)
    total = residual + x
    with poisoned():
        y = cuda.rms_norm(x, weight, 1e-5)
        summed = cuda.add_rms_norm(x, residual, weight, 1e-5)
    assert_rows_close(y, _rms_norm(x, weight, 1e-5), dtype)
    assert torch.equal(residual, total)
    assert_rows_close(summed, _rms_norm(total, weight, 1e-5), dtype)


def check_gated_activation(device: str, dtype: torch.dtype, kind: str, rows: int, dim: int) -> None:
    gate_up = random(rows, 2 * dim, device=device, dtype=dtype, scale=3)
    with poisoned():
        y = cuda.gated_activation(gate_up, kind)
    assert_rows_close(y, _gated(gate_up, kind), dtype)


def check_linear(device: str, dtype: torch.dtype, rows: int, inputs: int, out: int, has_bias: bool = False) -> None:
    weight = random(out, inputs, device=device, dtype=dtype)
    bias = random(out, device=device, dtype=dtype, scale=inputs**0.5) if has_bias else None
    x = random(rows, inputs, device=device, dtype=dtype)
    with poisoned():
        y = cuda.linear(x, weight, bias)
    expected = x.double() @ weight.double().T
    assert y.shape == (rows, out)
    assert_rows_close(y, expected if bias is None else expected + bias.double(), dtype)
    assert torch.equal(y, cuda.linear(x, weight, bias)), "not the same twice"
    with poisoned():
        wide = cuda.logits(x, weight)
    assert wide.dtype is torch.float32
    assert_rows_close(wide, expected, torch.float32)


def check_gated_linear(
    device: str, dtype: torch.dtype, kind: str, rows: int, inputs: int, dim: int, has_bias: bool = False
) -> None:
    weight = random(2 * dim, inputs, device=device, dtype=dtype, scale=2 * inputs**-0.5)
    bias = random(2 * dim, device=device, dtype=dtype) if has_bias else None
    x = random(rows, inputs, device=device, dtype=dtype)
    with poisoned():
        y = cuda.gated_linear(x, weight, bias, kind)
    gate_up = x.double() @ weight.double().T
    assert y.shape == (rows, dim)
    assert_rows_close(y, _gated(gate_up if bias is None else gate_up + bias.double(), kind), dtype)


def check_many_rows(
    device: str, dtype: torch.dtype, tiling: Tiling, form: str, rows: int, inputs: int, out: int, has_bias: bool = False
) -> None:
    scale = 2 * inputs**-0.5 if form in GATED_FORMS else 1
    weight = random(out, inputs, device=device, dtype=dtype, scale=scale)
    bias = random(out, device=device, dtype=dtype) if has_bias else None
    x = random(rows, inputs, device=device, dtype=dtype)
    with poisoned():
        y = cuda.gemm.many_rows(tiling, x, weight, bias, form)
    expected = x.double() @ weight.double().T
    expected = expected if bias is None else expected + bias.double()
    assert_rows_close(y, _gated(expected, form) if form in GATED_FORMS else expected, y.dtype)
    assert torch.equal(y, cuda.gemm.many_rows(tiling, x, weight, bias, form)), "not the same twice"


def grouped_weight(
    device: str, dtype: torch.dtype, inputs: int, out: int, bits: Literal[4, 8], group_size: int, is_symmetric: bool
) -> tuple[PackedWeight, Tensor]:
    """(A weight of grouped integers, packed in two parts, and the same in float64), its outputs about 1 in size."""
    scheme = Scheme("int", bits, (1, group_size), is_symmetric)
    plain = random(out, inputs, device=device, dtype=torch.float32, scale=2 * inputs**-0.5)
    whole = round_to_nearest(plain + (0 if is_symmetric else 0.3 * inputs**-0.5), scheme)
    whole = replace(whole, scales=whole.scales.to(dtype))
    with poisoned():
        weight = empty(out, inputs, group_size or inputs, bits, dtype, partial(torch.empty, device=device))
    first = out // 2 // 16 * 16
    for part in (slice(0, first), slice(first, out)):
        zeros = None if whole.zeros is None else whole.zeros[part]
        put(weight, part.start, whole.numbers[part], whole.scales[part], zeros)
    return weight, whole.dequantize().double()


def check_grouped_linear(
    product: Callable[..., Tensor],
    weight: PackedWeight,
    plain: Tensor,
    form: str,
    rows: int,
    has_bias: bool = False,
    is_rounded: bool = False,
) -> None:
    """product(x, weight, bias, form) of a weight and what it stands for. is_rounded: numbers of it become x's type."""
    device, (out, inputs) = str(plain.device), plain.shape
    bias = random(out, device=device, dtype=weight.dtype) if has_bias else None
    x = random(rows, inputs, device=device, dtype=weight.dtype)
    with poisoned():
        y = product(x, weight, bias, form)
    expected = x.double() @ plain.T
    expected = expected if bias is None else expected + bias.double()
    precision = x.dtype if is_rounded else y.dtype
    assert_rows_close(y, _gated(expected, form) if form in GATED_FORMS else expected, precision)
    assert torch.equal(y, product(x, weight, bias, form)), "not the same twice"


def rounded_weight(device: str, stored: torch.dtype, inputs: int, out: int) -> tuple[Tensor, Tensor]:
    """(Numbers [out, in] of 8 bits, scales [out]) of a weight whose outputs are about 1 in size."""
    numbers, scales = reference.round_rows(
        random(out, inputs, device=device, dtype=torch.float32, scale=2 * inputs**-0.5), stored
    )
    return numbers, scales.squeeze(1)


def check_rounding(device: str, dtype: torch.dtype, stored: torch.dtype, rows: int, dim: int) -> None:
    """Rows rounded as they are, and as a norm and an activation make them: to the last bit as in two steps."""
    sizes = torch.logspace(-3, 3, rows, device=device).unsqueeze(1)
    x = (random(rows, dim, device=device, dtype=torch.float32) * sizes).to(dtype)
    x[rows // 2] = 0
    with poisoned():
        y = rounding.round_rows(x, stored)
    # a GPU's torch divides less exactly
    _assert_rounded(y, reference.round_inputs(x.cpu(), stored))
    spoilt = x.clone()
    spoilt[-1, dim // 2] = torch.nan
    scales = rounding.round_rows(spoilt, stored).scales
    assert scales[-1].isnan(), "and no result is a number"
    assert torch.equal(scales[:-1], y.scales[:-1])
    gate_up = random(rows, 2 * dim, device=device, dtype=dtype, scale=3)
    for kind in ("silu", "gelu_tanh"):
        with poisoned():
            y = rounding.gated_activation_rounded(gate_up, kind, stored)
        _assert_rounded(y, rounding.round_rows(cuda.gated_activation(gate_up, kind), stored))
    if dim > 16_384:
        return
    for weight_dtype in (dtype, torch.float32):
        weight = random(dim, device=device, dtype=weight_dtype)
        residual = random(rows, dim, device=device, dtype=dtype)
        total = residual.clone()
        normed = cuda.add_rms_norm(x, total, weight, 1e-5)
        with poisoned():
            y = rounding.add_rms_norm_rounded(x, residual, weight, 1e-5, stored)
        assert torch.equal(residual, total)
        _assert_rounded(y, rounding.round_rows(normed, stored))


def _assert_rounded(y: RoundedRows, expected: RoundedRows) -> None:
    assert torch.equal(y.scales.cpu(), expected.scales.cpu())
    assert torch.equal(y.numbers.cpu().float(), expected.numbers.cpu().float())


def check_rounded_linear(
    device: str,
    product: Callable[..., Tensor],
    stored: torch.dtype,
    dtype: torch.dtype,
    form: str,
    rows: int,
    inputs: int,
    out: int,
    has_bias: bool = False,
) -> None:
    """product(x, numbers, scales, bias, form) of numbers of 8 bits."""
    numbers, scales = rounded_weight(device, stored, inputs, out)
    x = reference.round_inputs(random(rows, inputs, device=device, dtype=dtype), stored)
    bias = random(out, device=device, dtype=dtype) if has_bias else None
    with poisoned():
        y = product(x, numbers, scales, bias, form)
    wide = x.numbers.double() * x.scales.double().unsqueeze(1)
    expected = wide @ (numbers.double() * scales.double().unsqueeze(1)).T
    expected = expected if bias is None else expected + bias.double()
    assert_rows_close(y, _gated(expected, form) if form in GATED_FORMS else expected, y.dtype)
    assert torch.equal(y, product(x, numbers, scales, bias, form)), "not the same twice"


def check_blockwise_linear(
    device: str,
    product: Callable[..., Tensor],
    dtype: torch.dtype,
    form: str,
    rows: int,
    inputs: int,
    out: int,
    has_bias: bool = False,
) -> None:
    """product(x, numbers, scales, bias, form) of e4m3 in squares of 128 by 128, x rounded by panels of 128 inputs."""
    plain = random(out, inputs, device=device, dtype=torch.float32, scale=2 * inputs**-0.5)
    sizes = torch.rand(-(-out // 128), -(-inputs // 128), device=device) * 4
    plain *= sizes.repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :inputs]
    weight = round_to_nearest(plain, Scheme("float", 8, (128, 128), rounds_inputs=True))
    x = random(rows, inputs, device=device, dtype=dtype)
    x[:, : inputs // 3] *= 10
    bias = random(out, device=device, dtype=dtype) if has_bias else None
    with poisoned():
        rounded = rounding.round_panels(x)
        y = product(rounded, weight.numbers, weight.scales, bias, form)
    panels = F.pad(x.float(), (0, -inputs % 128)).unflatten(1, (-1, 128))
    numbers, scales = reference.round_rows(panels.cpu(), torch.float8_e4m3fn)  # a GPU's torch divides less exactly
    assert torch.equal(rounded.numbers.cpu().float(), numbers.float().flatten(1)[:, :inputs])
    assert torch.equal(rounded.scales[:, :rows].cpu(), scales.squeeze(2).T)
    wide = (numbers.double() * scales.double()).flatten(1)[:, :inputs].to(device)
    expected = wide @ weight.dequantize().double().T
    expected = expected if bias is None else expected + bias.double()
    assert_rows_close(y, _gated(expected, form) if form in GATED_FORMS else expected, y.dtype)
    assert torch.equal(y, product(rounded, weight.numbers, weight.scales, bias, form)), "not the same twice"


def check_batch_invariance(device: str, dtype: torch.dtype, inputs: int, out: int, sizes: tuple[int, ...]) -> None:
    """The first rows of a product have the same bits however many there are."""
    weight = random(out, inputs, device=device, dtype=dtype, scale=inputs**-0.5)
    x = random(max(sizes), inputs, device=device, dtype=dtype)
    products = {
        "linear": lambda x: cuda.linear(x, weight, None),
        "gated_linear": lambda x: cuda.gated_linear(x, weight, None, "silu"),
        "logits": lambda x: cuda.logits(x, weight),
    }
    cuda.gemm.use_batch_invariant(True)
    try:
        for name, product in products.items():
            whole = product(x)
            for size in sizes:
                assert torch.equal(product(x[:size]), whole[:size]), (name, size)
                assert torch.equal(product(x[-size:]), whole[-size:]), (name, size)
    finally:
        cuda.gemm.use_batch_invariant(False)


def check_rotate_and_store(
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    norm: torch.dtype | None,
    kv_dtype: torch.dtype | None = None,
    num_tokens: int = 37,
) -> None:
    num_heads, num_kv_heads = heads
    num_blocks, max_positions, eps = num_tokens // BLOCK_SIZE + 7, 50, 1e-6
    scale = 1.0 if kv_dtype is None else 100.0  # some numbers are beyond e4m3's range
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device, dtype=dtype, scale=scale)
    positions = torch.randint(0, max_positions, (num_tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:num_tokens].int()
    angles = torch.rand(max_positions, rotary_dim // 2, device=device) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    q_norm, k_norm = (None if norm is None else random(head_dim, device=device, dtype=norm) for _ in range(2))
    shape = (2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    caches = torch.full(shape, 7.0, device=device).to(kv_dtype or dtype)
    with poisoned():
        q = cuda.rotate_and_store(qkv, positions, slots, cos_sin, *caches.unbind(), q_norm, k_norm, eps)
    wide = qkv.view(num_tokens, -1, head_dim).double()
    wide_q, wide_k, wide_v = wide.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        wide_q, wide_k = _rms_norm(wide_q, q_norm, eps), _rms_norm(wide_k, k_norm, eps)
    angle = angles[positions.long()].double().unsqueeze(1)
    assert_rows_close(q, _rotate(wide_q, angle), dtype)
    k_cache, v_cache = caches.float().transpose(2, 3).flatten(1, 2)  # [slots, num_kv_heads, head_dim] each
    limit = torch.finfo(caches.dtype).max
    assert_rows_close(k_cache[slots.long()], _rotate(wide_k, angle).clamp(-limit, limit), kv_dtype or dtype)
    assert torch.equal(v_cache[slots.long()].float(), wide_v.clamp(-limit, limit).to(caches.dtype).float())
    untouched = torch.ones(num_blocks * BLOCK_SIZE, dtype=torch.bool, device=device).scatter(0, slots.long(), False)
    assert (k_cache[untouched] == 7).all()
    assert (v_cache[untouched] == 7).all()


def check_attention(
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    lengths: list[tuple[int, int]],  # of each request: tokens of this step, tokens in the cache after it
    window: int = 0,
    softcap: float = 0.0,
    kv_dtype: torch.dtype | None = None,
    padding: tuple[int, int] | None = None,  # tokens of no request and requests of no token, as in a graph
) -> None:
    num_heads, num_kv_heads = heads
    batch, k_cache, v_cache = _paged(device, kv_dtype or dtype, num_kv_heads, head_dim, lengths)
    num_tokens = sum(length for length, _ in lengths)
    if padding is not None:
        num_tokens += padding[0]
        batch = _padded(batch, *padding)
    q = random(num_tokens, num_heads, head_dim, device=device, dtype=dtype, scale=2)
    scale = head_dim**-0.5
    with poisoned():
        out = cuda.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
    first = 0
    for i, (length, context) in enumerate(lengths):
        table = batch.block_table[batch.rows[i].long(), : -(-context // BLOCK_SIZE)].long()
        k, v = (cache[table].transpose(1, 2).flatten(0, 1)[:context] for cache in (k_cache, v_cache))
        expected = _attention(q[first : first + length], k, v, scale, window, softcap)
        assert_rows_close(out[first : first + length], expected, dtype)
        first += length


SAMPLING = (  # what a row may ask for; each also gets a seed
    {"temperature": 0},
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 300},
    {"top_p": 0.3},
    {"top_p": 0.9, "temperature": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"min_p": 0.001, "top_p": 0.7},
    {"temperature": 0, "logit_bias": {3: 6.0, 7: -50.0, 8: 5.5}},
    {"temperature": 0, "min_tokens": 1000},
    {"repetition_penalty": 1.3, "top_p": 0.8},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 0.7, "presence_penalty": -1, "logit_bias": {1: 3.0}, "min_tokens": 3, "top_k": 10},
)


def check_sample(device: str, vocab_size: int, requests: list[dict], spread: float = 3.0, max_len: int = 60) -> None:
    """requests: sampling parameters. spread: of the logits, a multiple of 0.25 where it is negative: many are equal."""
    num_rows = len(requests) + 2
    rows = torch.randperm(num_rows)[: len(requests)].int()
    ends = torch.randint(1, max_len + 1, (len(requests),), dtype=torch.int32)
    ends[0] = max_len  # no place for its token
    token_ids = torch.randint(0, vocab_size, (num_rows, max_len), dtype=torch.int32)
    token_ids[:, ::3] = token_ids[:, :1]  # a token that comes often
    logits = _spread(len(requests), vocab_size, spread)
    lines = torch.full((num_rows, sampling_line.NUM_WORDS), -1, dtype=torch.int32)
    packed = []
    for i, request in enumerate(requests):
        params = SamplingParams(**{"seed": int(torch.randint(-(2**63), 2**63 - 1, ())), "max_tokens": None} | request)
        packed.append(sampling_line.pack(params, int(ends[i]) // 2, [0, vocab_size - 1, int(logits[i].argmax())]))
        lines[rows[i], : len(packed[i])] = torch.from_numpy(packed[i])
    placed = token_ids.to(device, copy=True)
    with poisoned():
        tokens = cuda.sample(
            logits.to(device, copy=True), lines.to(device), rows.to(device), ends.to(device), placed
        ).cpu()
    for i, words in enumerate(packed):
        line, row, end = sampling_line.unpack(words), int(rows[i]), int(ends[i])
        _check_draw(logits[i].numpy(), line, token_ids[row, :end].numpy(), int(tokens[i]), (requests[i], i, row, end))
        if end < max_len:
            token_ids[row, end] = tokens[i]
    assert torch.equal(placed.cpu(), token_ids), "a token is not in its place, or something else is not"


def _check_draw(
    logits: np.ndarray, line: sampling_line.Line, history: np.ndarray, token: int, case: tuple[object, ...]
) -> None:
    """By sorting, in float64 but for the distances from the best, which are defined in float32."""
    header, wide = line.header, logits.astype(np.float64)
    wide[line.biased] += line.biases
    if len(history) - header["num_prompt_tokens"] < header["min_tokens"]:
        wide[line.forbidden] = -np.inf
    if header["has_penalties"]:
        seen = np.unique(history)
        factor = float(header["repetition_penalty"])
        wide[seen] = np.where(wide[seen] > 0, wide[seen] / factor, wide[seen] * factor)
        counts = np.bincount(history[header["num_prompt_tokens"] :], minlength=len(wide))
        wide -= header["frequency_penalty"] * counts + header["presence_penalty"] * (counts > 0)
    if not header["inverse_temperature"]:
        assert wide[token] >= wide.max() - 1e-5, case
        assert line.changes_logits or token == logits.argmax(), case
        return
    scaled = wide.astype(np.float32) * header["inverse_temperature"]
    steps = np.minimum((scaled.max() - scaled) * np.float32(2**24), 2.0**30).astype(np.int64)
    order = np.argsort(steps, kind="stable")
    worst = float(header["max_steps"])
    if 0 < header["top_k"] < len(order):
        worst = min(worst, steps[order[header["top_k"] - 1]])
    mass = np.cumsum(np.where(steps <= worst, np.exp(-steps / 2**24), 0.0)[order])
    surely, perhaps = (  # kept, whatever the rounding of sums and of penalties
        steps <= min(worst + slack, steps[order[np.searchsorted(mass, min(1.0, top_p) * mass[-1])]] + slack)
        if (top_p := float(header["top_p"]) * (1 + sign * 2e-6)) < 1
        else steps <= worst + slack
        for sign, slack in ((-1, -100 if line.changes_logits else 0), (1, 100 if line.changes_logits else 0))
    )
    seed = torch.tensor([int(header["seed"])])
    noise = reference.gumbel_noise(seed, torch.tensor([len(history)]), len(wide))[0].numpy()
    assert perhaps[token], (*case, "was not to be drawn")
    assert scaled[token] + noise[token] >= (scaled + noise)[surely].max(initial=-np.inf) - 1e-4, (*case, "not the best")


def check_take_best(device: str, rows: int, vocab_size: int) -> None:
    logits = torch.randint(-5, 5, (rows, vocab_size)).float()  # many are equal
    logits[0] = -1.0
    logits[-1, -1] = 9.0
    places, ends = torch.randperm(rows + 3)[:rows].int(), torch.randint(0, 9, (rows,), dtype=torch.int32)
    token_ids = torch.full((rows + 3, 8), -1, dtype=torch.int32, device=device)
    with poisoned():
        tokens = cuda.take_best(logits.to(device), places.to(device), ends.to(device), token_ids).cpu()
    expected = torch.from_numpy(logits.numpy().argmax(-1)).int()  # numpy's takes the first
    assert torch.equal(tokens, expected)
    placed = torch.full((rows + 3, 9), -1, dtype=torch.int32)
    placed[places.long(), ends.long()] = expected
    assert torch.equal(token_ids.cpu(), placed[:, :8])


def check_rows_without_a_token(device: str, vocab_size: int, requests: Sequence[dict]) -> None:
    """Every second row has no token, whatever its request's parameters: it says so, and its neighbours draw as ever."""
    num_rows, max_len = 2 * len(requests), 8
    logits = _spread(num_rows, vocab_size, 3.0)
    spoilt, (nan, inf) = logits.clone(), (torch.nan, torch.inf)
    for i, row in enumerate(spoilt[1::2]):
        here = slice(None) if i % 2 else torch.randint(vocab_size, ())
        row[here] = [inf, nan, -nan, -inf, nan, nan][i % 6]
    rows, ends = torch.arange(num_rows, dtype=torch.int32), torch.full((num_rows,), 4, dtype=torch.int32)
    lines = torch.zeros(num_rows, sampling_line.NUM_WORDS, dtype=torch.int32)
    for row, line in enumerate(lines):
        params = SamplingParams(**{"seed": row, "max_tokens": None} | requests[row // 2])
        words = sampling_line.pack(params, 2, [])
        line[: len(words)] = torch.from_numpy(words)
    history = torch.randint(0, vocab_size, (num_rows, max_len), dtype=torch.int32)

    def drawn(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        token_ids = history.to(device, copy=True)
        arguments = (each.to(device) for each in (lines, rows.contiguous(), ends[: len(rows)]))
        with poisoned():
            return cuda.sample(logits.to(device, copy=True), *arguments, token_ids).cpu(), token_ids[:, 4].cpu()

    tokens, placed = drawn(spoilt, rows)
    assert tokens[1::2].tolist() == [-1] * len(requests)
    assert placed[1::2].tolist() == [0] * len(requests), "a step that is launched already needs a token"
    assert torch.equal(tokens[::2], drawn(logits[::2].contiguous(), rows[::2])[0])

    token_ids = history.to(device, copy=True)
    with poisoned():
        best = cuda.take_best(spoilt.to(device), rows.to(device), ends.to(device), token_ids)
        cuda.logprobs(spoilt.to(device), best, 5)  # of nothing, but without reading beside the rows
    assert best[1::2].tolist() == [-1] * len(requests)
    assert torch.equal(best[::2].cpu(), torch.from_numpy(logits.cpu().numpy().argmax(-1)).int()[::2])
    assert torch.equal(token_ids[:, 4], best.clamp(min=0))


def check_logprobs(device: str, rows: int, vocab_size: int, num_top: int, spread: float = 3.0) -> None:
    """spread: of the logits, whole multiples of 0.25 where it is negative: many are equal."""
    logits = _spread(rows, vocab_size, spread)
    tokens = torch.randint(0, vocab_size, (rows,), dtype=torch.int32)
    with poisoned():
        chosen, ranks, values, ids = (x.cpu() for x in cuda.logprobs(logits.to(device), tokens.to(device), num_top))
    expected = logits.double().log_softmax(-1)
    own = tokens.long().unsqueeze(-1)
    torch.testing.assert_close(chosen.double(), expected.gather(-1, own).squeeze(-1), rtol=1e-6, atol=3e-6)
    assert torch.equal(ranks.long(), (logits > logits.gather(-1, own)).sum(-1) + 1)
    best = np.argsort(-logits.numpy(), axis=-1, kind="stable")[:, :num_top]  # of equal ones the lowest
    assert np.array_equal(ids.numpy(), best)
    torch.testing.assert_close(values.double(), expected.gather(-1, torch.from_numpy(best)), rtol=1e-6, atol=3e-6)


def _spread(rows: int, vocab_size: int, spread: float) -> Tensor:
    logits = torch.randn(rows, vocab_size) * spread
    return (logits * 4).round() / 4 if spread < 0 else logits


def check_chunks_change_no_bit(
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    chunks: list[int],
    window: int = 0,
    softcap: float = 0.0,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """A prompt as one chunk, and as many: each is a request of the same batch that sees the ones before it."""
    num_heads, num_kv_heads = heads
    num_tokens = sum(chunks)
    batch, k_cache, v_cache = _paged(device, kv_dtype or dtype, num_kv_heads, head_dim, [(num_tokens, num_tokens)])
    q = random(num_tokens, num_heads, head_dim, device=device, dtype=dtype, scale=2)
    ends = torch.tensor(chunks, device=device).cumsum(0).int()
    parts = replace(
        batch,
        query_start=torch.cat([batch.query_start[:1], ends]),
        context_lens=ends,
        rows=batch.rows.repeat(len(chunks)),
        num_decodes=0,
        max_query_len=max(chunks),
    )
    scale = head_dim**-0.5
    cuda.attention.use_batch_invariant(True)
    try:
        whole = cuda.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
        in_parts = cuda.paged_attention(q, k_cache, v_cache, parts, scale, window, softcap)
    finally:
        cuda.attention.use_batch_invariant(False)
    assert torch.isfinite(whole).all()
    differs = (whole != in_parts).flatten(1).any(1)
    assert not differs.any(), f"tokens {differs.nonzero().flatten()[:8].tolist()} of {num_tokens}"


def check_gumbel_noise(device: str, rows: int, vocab_size: int, position_dtype: torch.dtype) -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,))
    positions = torch.randint(0, 2**20, (rows,), dtype=position_dtype)
    with poisoned():
        noise = cuda.gumbel_noise(seeds.to(device), positions.to(device), vocab_size)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        for token in {0, 1, 2, 3, vocab_size // 2, vocab_size - 1}:
            word = _philox(token // 4, position, seed % 2**64)[token % 4]
            uniform = torch.tensor(((word >> 9) + 0.5) * 2.0**-23, dtype=torch.float64)
            expected = -torch.log(-torch.log(uniform))
            assert abs(noise[row, token].item() - expected.item()) < 1e-5, (row, token)
    assert torch.isfinite(noise).all()


def _paged(
    device: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int, lengths: list[tuple[int, int]]
) -> tuple[ForwardBatch, Tensor, Tensor]:
    """A batch whose blocks and rows lie anywhere, and caches that are NaN wherever nothing was stored."""
    query_lens, contexts = zip(*lengths, strict=True)
    needed = [-(-context // BLOCK_SIZE) for context in contexts]
    num_blocks, max_num_seqs = sum(needed) + 3, len(lengths) + 2
    block_table = torch.full((max_num_seqs, max(needed) + 2), 2**30, dtype=torch.int32)
    rows, blocks = torch.randperm(max_num_seqs)[: len(lengths)], torch.randperm(num_blocks)
    num_filled = torch.zeros(num_blocks, dtype=torch.int32)  # slots of each block
    for row, own, context in zip(rows, blocks[: sum(needed)].split(needed), contexts, strict=True):
        block_table[row, : len(own)] = own.int()
        num_filled[own] = (context - torch.arange(0, context, BLOCK_SIZE, dtype=torch.int32)).clamp_max(BLOCK_SIZE)
    caches = torch.randn(2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim, device=device)
    is_unfilled = torch.arange(BLOCK_SIZE) >= num_filled.unsqueeze(1)
    caches.masked_fill_(is_unfilled[None, :, None, :, None].to(device), torch.nan)
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    decodes = [length == 1 for length in query_lens]
    num_decodes = decodes.index(False) if False in decodes else len(decodes)
    num_tokens = int(query_start[-1])
    unused = torch.zeros(num_tokens, dtype=torch.int32)
    batch = ForwardBatch(
        token_ids=unused,
        positions=unused,
        slot_mapping=unused,
        query_start=query_start.to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        rows=rows.int().to(device),
        block_table=block_table.to(device),
        num_decodes=num_decodes,
        max_query_len=max(query_lens),
        max_context_len=max(contexts),
    )
    return batch, *caches.to(dtype).unbind()


def _padded(batch: ForwardBatch, num_tokens: int, num_requests: int) -> ForwardBatch:
    """With tokens that belong to no request, and requests without tokens, whose row leads nowhere."""
    query_start, lens = batch.query_start, batch.context_lens
    return replace(
        batch,
        query_start=torch.cat([query_start, query_start[-1:].expand(num_requests)]),
        context_lens=torch.cat([lens, lens.new_zeros(num_requests)]),
        rows=torch.cat([batch.rows, lens.new_full((num_requests,), 2**30)]),
        num_decodes=0,
        max_query_len=len(batch.token_ids) + num_tokens,
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Of one request, in float64: q [tokens, num_heads, head_dim], k and v [context, num_kv_heads, head_dim]."""
    q, k, v = q.double(), k.double(), v.double()
    q = q.unflatten(1, (k.shape[1], -1))  # [tokens, num_kv_heads, heads of each, head_dim]
    scores = torch.einsum("tngd,cnd->ngtc", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(k) - len(q), len(k), device=q.device).unsqueeze(1)
    distance = position - torch.arange(len(k), device=q.device)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("ngtc,cnd->tngd", weights, v).flatten(1, 2)


def _gated(gate_up: Tensor, kind: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return (gate / (1 + torch.exp(-gate)) if kind == "silu" else gate / 2 * (1 + torch.tanh(inner))) * up


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """As a product of complex numbers."""
    half = angle.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def _philox(counter: int, position: int, key: int) -> list[int]:
    """Philox 4x32-10 in Python's integers, as in the paper."""
    c, key0, key1 = [counter, 0, position, 0], key % 2**32, key >> 32
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ key0, right % 2**32, (left >> 32) ^ c[3] ^ key1, left % 2**32]
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return c


def newest_attention_files(arch: str, dtype: torch.dtype, head_dim: int, is_masked: bool) -> tuple[str, str]:
    """The newest attention kernels for whatever they can do, chosen by default or not."""
    if dtype is torch.float32 or head_dim % 16:
        return "attention/decode_any.cu", "attention/decode_any.cu"
    has_own = arch == "sm_90a" and head_dim in (64, 128)
    return "attention/decode.cu", "attention/prefill_sm90.cu" if has_own else "attention/prefill.cu"
