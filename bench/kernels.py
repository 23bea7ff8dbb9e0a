"""Each CUDA op on its own, at the shapes of real models: time, bytes, FLOPs, and its share of what the GPU can do.

    python -m bench.kernels --output kernels.json

The ceilings (a large copy, a large matrix product) are measured in the same run. Inputs rotate among sets that together
overflow the L2 cache; calls are captured in a graph, and the median of its replays counts. Where PyTorch has the same
operation, it is timed the same way. The host column is the time Python needs for one call.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.environment import environment
from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE
from engine.ops import cuda

ROTATED_BYTES = 256 << 20  # several times the L2 cache of any GPU
MAX_SETS = 64
REPLAYS = 15
Call = Callable[[], Any]


@dataclass(frozen=True)
class Model:
    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


MODELS = (
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128_256),
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 49_152),
)
DECODES = (  # requests, context
    *((1, 128), (1, 544), (1, 2048), (1, 32_768), (1, 131_072)),
    *((16, 544), (64, 544), (64, 1024), (64, 4096), (64, 8192), (256, 2048)),
)
PREFILLS = ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048), (1, 512, 16_384), (8, 32, 2048))


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make` gives a call on fresh inputs, and the same in plain PyTorch if it has it."""

    op: str
    shape: str
    bytes: float  # moved at least
    flops: float
    make: Callable[[], tuple[Call, Call | None]]


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Timing:
    op: str
    shape: str
    us: float
    host_us: float
    torch_us: float | None
    bytes: float
    flops: float
    tb_per_s: float
    tflop_per_s: float
    bound: str  # what limits it: bytes or flops
    share: float  # of that ceiling
    ratio: float | None  # PyTorch's time over ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--only", default="", help="only ops whose name holds this text")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("kernels are timed on a GPU, and there is none")
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, ", end="")
    print(f"bf16 matrix product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s\n")
    print(f"{'op':<20}{'shape':<44}{'us':>10}{'TB/s':>7}{'TFLOP/s':>9}{'share':>14}{'torch':>8}{'host us':>9}")
    timings = []
    for case in cases():
        if arguments.only not in case.op:
            continue
        timings.append(measure(case, ceilings))
        print(row(timings[-1]), flush=True)
        torch.cuda.empty_cache()
    if arguments.output:
        result = {"ceilings": asdict(ceilings), "kernels": [asdict(timing) for timing in timings], **environment()}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def row(timing: Timing) -> str:
    share, ratio = f"{timing.share:.0%} of {timing.bound}", f"{timing.ratio:.2f}x" if timing.ratio else ""
    return (
        f"{timing.op:<20}{timing.shape:<44}{timing.us:>10.1f}{timing.tb_per_s:>7.2f}{timing.tflop_per_s:>9.1f}"
        f"{share:>14}{ratio:>8}{timing.host_us:>9.1f}"
    )


def measure_ceilings() -> Ceilings:
    copied, size = 4 << 30, 8192
    source = torch.randn(copied // 4, device="cuda")
    a, b = _random(size, size), _random(size, size)
    copy_us = _median_us(partial(torch.empty_like(source).copy_, source))
    matmul_us = _median_us(partial(torch.mm, a, b))
    return Ceilings(bytes_per_s=2 * copied / copy_us * 1e6, flops_per_s=2 * size**3 / matmul_us * 1e6)


def measure(case: Case, ceilings: Ceilings) -> Timing:
    num_sets = int(min(MAX_SETS, max(2, ROTATED_BYTES // max(case.bytes, 1) + 1)))
    calls, torch_calls = zip(*(case.make() for _ in range(num_sets)), strict=True)
    us = time_calls(calls)
    torch_us = time_calls(torch_calls) if torch_calls[0] else None
    bytes_s, flops_s = case.bytes / ceilings.bytes_per_s, case.flops / ceilings.flops_per_s
    return Timing(
        case.op,
        case.shape,
        us,
        _host_us(calls),
        torch_us,
        case.bytes,
        case.flops,
        tb_per_s=case.bytes / us / 1e6,
        tflop_per_s=case.flops / us / 1e6,
        bound="bytes" if bytes_s >= flops_s else "flops",
        share=max(bytes_s, flops_s) / us * 1e6,
        ratio=torch_us / us if torch_us else None,
    )


def time_calls(calls: tuple[Call, ...]) -> float:
    """Microseconds of one call: the calls one after the other in a graph, at least 16 of them."""
    rounds = -(-16 // len(calls))
    torch.cuda.synchronize()  # the inputs are still being made, on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]  # kept: each call writes to memory of its own
    us = _median_us(graph.replay) / len(kept)
    del kept
    graph.reset()
    return us


def cases() -> Iterator[Case]:
    for model in MODELS:
        for num_tokens in (1, 64, 8192):
            yield from _row_cases(model, num_tokens)
        for num_tokens in (1, 8, 16, 64, 8192):
            yield from _linear_cases(model, num_tokens)
        for num_requests, context in DECODES:
            yield _attention_case(model, "decode", num_requests, 1, context)
        for num_requests, length, context in PREFILLS:
            yield _attention_case(model, "prefill", num_requests, length, context)
        yield _attention_case(model, "decode window 4096", 8, 1, 32_768, window=4096)
        yield _attention_case(model, "prefill softcap", 1, 4096, 4096, softcap=50.0)
        for num_rows in (1, 64):
            yield _noise_case(model, num_rows)


def _row_cases(model: Model, num_tokens: int) -> Iterator[Case]:
    hidden, inner, d = model.hidden_size, model.intermediate_size, model.head_dim
    num_all_heads = model.num_heads + 2 * model.num_kv_heads
    shape = f"{model.name} {num_tokens} x"
    moved = 2.0 * num_tokens  # bytes of one bf16 column
    yield Case("rms_norm", f"{shape} {hidden}", 2 * moved * hidden, 0, partial(_norm, num_tokens, hidden))
    yield Case("add_rms_norm", f"{shape} {hidden}", 4 * moved * hidden, 0, partial(_add_norm, num_tokens, hidden))
    yield Case("gated_activation", f"{shape} {inner}", 3 * moved * inner, 0, partial(_gate, num_tokens, inner))
    make = partial(_rotate, model, num_tokens)
    yield Case("rotate_and_store", f"{shape} {num_all_heads} x {d}", 2 * moved * num_all_heads * d, 0, make)


def _linear_cases(model: Model, num_tokens: int) -> Iterator[Case]:
    hidden, inner, q_size = model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim
    qkv_size = q_size + 2 * model.num_kv_heads * model.head_dim
    for inputs, out in ((hidden, qkv_size), (q_size, hidden), (hidden, 2 * inner), (inner, hidden)):
        moved = 2.0 * (num_tokens * (inputs + out) + inputs * out)
        shape = f"{model.name} {num_tokens} x {inputs} to {out}"
        make = partial(_linear, num_tokens, inputs, out)
        yield Case("linear", shape, moved, 2.0 * num_tokens * inputs * out, make)


def _norm(num_tokens: int, dim: int) -> tuple[Call, Call]:
    x, weight = _random(num_tokens, dim), _random(dim)
    return lambda: cuda.rms_norm(x, weight, 1e-5), lambda: F.rms_norm(x, (dim,), weight, 1e-5)


def _add_norm(num_tokens: int, dim: int) -> tuple[Call, Call]:
    x, residual, weight = _random(num_tokens, dim), _random(num_tokens, dim), _random(dim)

    def plain() -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, (dim,), weight, 1e-5)

    return lambda: cuda.add_rms_norm(x, residual, weight, 1e-5), plain


def _gate(num_tokens: int, dim: int) -> tuple[Call, Call]:
    gate_up = _random(num_tokens, 2 * dim)
    gate, up = gate_up.chunk(2, dim=-1)
    return lambda: cuda.gated_activation(gate_up, "silu"), lambda: F.silu(gate) * up


def _linear(num_tokens: int, inputs: int, out: int) -> tuple[Call, Call]:
    x, weight = _random(num_tokens, inputs), _random(out, inputs)
    return lambda: cuda.linear(x, weight, None), lambda: F.linear(x, weight)


def _rotate(model: Model, num_tokens: int) -> tuple[Call, None]:
    qkv = _random(num_tokens, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim)
    k_cache, v_cache = _caches(model, -(-num_tokens // BLOCK_SIZE))
    positions = torch.randint(0, 8192, (num_tokens,), dtype=torch.int32, device="cuda")
    slots = torch.randperm(num_tokens, device="cuda").int()
    cos_sin = torch.rand(8192, model.head_dim, device="cuda")
    return lambda: cuda.rotate_and_store(qkv, positions, slots, cos_sin, k_cache, v_cache, None, None, 0.0), None


def _noise_case(model: Model, num_rows: int) -> Case:
    def make() -> tuple[Call, Call]:
        seeds = torch.randint(0, 2**60, (num_rows,), device="cuda")
        plain = partial(torch.rand, num_rows, model.vocab_size, device="cuda")
        return lambda: cuda.gumbel_noise(seeds, seeds, model.vocab_size), lambda: -torch.log(-torch.log(plain()))

    return Case("gumbel_noise", f"{num_rows} x {model.vocab_size}", 4.0 * num_rows * model.vocab_size, 0, make)


def _attention_case(
    model: Model, op: str, num_requests: int, length: int, context: int, window: int = 0, softcap: float = 0.0
) -> Case:
    """Requests of equal length: the last `length` tokens of `context` each."""
    positions = range(context - length, context)
    num_pairs = num_requests * sum(min(position + 1, window or context) for position in positions)
    num_keys = num_requests * min(context, window + length if window else context)
    moved = 4.0 * num_keys * model.num_kv_heads * model.head_dim
    moved += 4.0 * num_requests * length * model.num_heads * model.head_dim
    flops = 4.0 * num_pairs * model.num_heads * model.head_dim
    shape = f"{model.name} {num_requests} x {length} of {context}"
    make = partial(_attention, model, num_requests, length, context, window, softcap)
    return Case(op, shape, moved, flops, make)


def _attention(
    model: Model, num_requests: int, length: int, context: int, window: int, softcap: float
) -> tuple[Call, Call | None]:
    num_tokens, num_blocks = num_requests * length, context // BLOCK_SIZE
    q = _random(num_tokens, model.num_heads, model.head_dim)
    k_cache, v_cache = _caches(model, num_requests * num_blocks)
    unused = torch.zeros(num_tokens, dtype=torch.int32, device="cuda")
    batch = ForwardBatch(
        token_ids=unused,
        positions=unused,
        slot_mapping=unused,
        query_start=torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device="cuda"),
        context_lens=torch.full((num_requests,), context, dtype=torch.int32, device="cuda"),
        rows=torch.arange(num_requests, dtype=torch.int32, device="cuda"),
        block_table=torch.randperm(num_requests * num_blocks, device="cuda").int().view(num_requests, num_blocks),
        num_decodes=num_requests if length == 1 else 0,
        max_query_len=length,
        max_context_len=context,
    )
    scale = model.head_dim**-0.5
    ours = partial(cuda.paged_attention, q, k_cache, v_cache, batch, scale, window, softcap)
    if window or softcap or 1 < length < context:
        return ours, None
    # PyTorch's own gets its keys and values contiguous: it knows no blocks.
    heads = q.view(num_requests, length, model.num_heads, model.head_dim).transpose(1, 2)
    k, v = (cache.view(num_requests, num_blocks, *cache.shape[1:]) for cache in (k_cache, v_cache))
    k, v = (each.transpose(1, 2).flatten(2, 3).contiguous() for each in (k, v))
    return ours, lambda: F.scaled_dot_product_attention(heads, k, v, is_causal=length > 1, enable_gqa=True)


def _caches(model: Model, num_blocks: int) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    return _random(*shape), _random(*shape)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _median_us(call: Call) -> float:
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) * 1e3


def _host_us(calls: tuple[Call, ...]) -> float:
    """Of a few calls after the GPU has gone idle: short of the queue's length, none of them waits."""
    samples = []
    for call in calls[:16]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


if __name__ == "__main__":
    main()
