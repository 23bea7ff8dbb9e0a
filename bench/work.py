"""The bytes and FLOPs that a step cannot do without, part by part, counted from the batch.

A multiplication and an addition are two FLOPs, and only products of matrices are counted as such. Bytes are those of
inputs, weights and results once each, as if caches held everything else: what a kernel moves more is its own waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.ceilings import Ceilings
from bench.floor import DTYPE_BYTES, layer_matrices, weight_bytes
from engine.batch import ScheduledRequest
from engine.model_config import ModelConfig
from engine.quantization.weight import Scheme

FLOAT32_BYTES = 4
NORM, ROTARY, ATTENTION, ACTIVATION = "norm", "rotary and KV write", "attention", "activation"
LOGITS, SAMPLING = "logits", "sampling"


@dataclass(frozen=True)
class Work:
    read: float = 0.0  # bytes
    written: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def scaled(self, factor: float) -> Work:
        return Work(self.read * factor, self.written * factor, self.flops * factor)

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time it takes: what binds it, bytes or FLOPs, at what the device was measured to reach."""
        return max(self.bytes_s(ceilings), self.flops_s(ceilings))

    def bytes_s(self, ceilings: Ceilings) -> float:
        return ceilings.bytes_s(self.read, self.written)

    def flops_s(self, ceilings: Ceilings) -> float:
        return self.flops / ceilings.flops_per_s


@dataclass(frozen=True)
class ModelWork:
    """One model's part in it: its shapes and in how many bytes its numbers lie."""

    model: ModelConfig
    dtype: str
    kv_dtype: str  # as `dtype`, or fp8
    scheme: Scheme | None = None  # of the layers' weights

    def step(self, requests: Sequence[ScheduledRequest]) -> dict[str, Work]:
        """The work of a step by part. Of the last layer only the tokens that draw go on after the attention."""
        c, size = self.model, DTYPE_BYTES[self.dtype]
        num_tokens, num_drawn = sum(r.num_tokens for r in requests), sum(r.samples for r in requests)
        rows_before = c.num_layers * num_tokens  # of all layers, up to the attention
        rows_after = (c.num_layers - 1) * num_tokens + num_drawn
        products = layer_matrices(c)
        rows = {"qkv": rows_before, "o": rows_after, "gate_up": rows_after, "down": rows_after}
        parts = {name: self._product(*products[name], rows[name]) for name in products}
        # The gated activation is part of the product that makes its inputs, where it can be.
        gate_up = parts["gate_up"]
        parts["gate_up"] = Work(gate_up.read, gate_up.written / 2, gate_up.flops)
        parts[ACTIVATION] = _each(rows_after * c.intermediate_size, 2, 1, size)
        parts[NORM] = self._norms(rows_before, rows_after, num_drawn)
        parts[ROTARY] = self._rotary(rows_before)
        parts[ATTENTION] = self._attention(requests)
        if num_drawn:
            num_logits = num_drawn * c.vocab_size
            read = size * c.hidden_size * (c.vocab_size + num_drawn)
            parts[LOGITS] = Work(read, FLOAT32_BYTES * num_logits, 2 * c.hidden_size * num_logits)
            parts[SAMPLING] = Work(FLOAT32_BYTES * num_logits)
        return parts

    def _product(self, outputs: int, inputs: int, rows: int) -> Work:
        """`rows` rows of all layers together; each layer's weight is read once."""
        size, num_weights = DTYPE_BYTES[self.dtype], self.model.num_layers * outputs * inputs
        weights = num_weights * weight_bytes(self.model, self.dtype, self.scheme)
        return Work(weights + size * rows * inputs, size * rows * outputs, 2.0 * rows * outputs * inputs)

    def _norms(self, rows_before: int, rows_after: int, num_drawn: int) -> Work:
        """Those that add to the residual: two numbers in and two out. Gemma has two more a layer, which do not."""
        c, size = self.model, DTYPE_BYTES[self.dtype]
        adding = _each((rows_before + rows_after + num_drawn) * c.hidden_size, 2, 2, size)
        is_sandwich = c.architecture.startswith("Gemma")
        return adding + (_each(2 * rows_after * c.hidden_size, 1, 1, size) if is_sandwich else Work())

    def _rotary(self, rows: int) -> Work:
        c, size = self.model, DTYPE_BYTES[self.dtype]
        heads, kv_heads = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
        written = size * heads + DTYPE_BYTES[self.kv_dtype] * kv_heads
        return Work(size * rows * (heads + kv_heads), rows * written)

    def _attention(self, requests: Sequence[ScheduledRequest]) -> Work:
        c, size = self.model, DTYPE_BYTES[self.dtype]
        heads = c.num_heads * c.head_dim
        token_bytes = 2 * c.num_kv_heads * c.head_dim * DTYPE_BYTES[self.kv_dtype]
        total = Work()
        for window in c.layer_windows:
            for request in requests:
                first, last = request.start + 1, request.start + request.num_tokens  # tokens that the ends see
                passed = size * request.num_tokens * heads
                seen = last - max(0, first - window) if window else last
                flops = 4.0 * heads * _pairs(first, last, window)
                total += Work(passed + token_bytes * seen, passed, flops)
        return total


def _pairs(first: int, last: int, window: int) -> int:
    """Keys seen by queries that see first, first + 1, ..., last tokens, but no more than the window each."""
    if window and first < window < last:
        return _pairs(first, window, 0) + (last - window) * window
    if window and window <= first:
        return (last - first + 1) * window
    return (first + last) * (last - first + 1) // 2


def _each(num: int, reads: int, writes: int, size: int) -> Work:
    return Work(float(reads * num * size), float(writes * num * size))
