"""Each CUDA op on its own, at the shapes of Llama 3.1 8B: time, bytes, FLOPs, and its share of what the GPU can do.

    python -m bench.kernels --output bench/results/h200-kernels.json

The ceilings (a large read, a large copy, a large matrix product) are measured in the same run. Inputs rotate among sets
that together overflow the L2 cache; calls are captured in a graph, and the median of its replays counts. Where PyTorch
has the same operation, it is timed the same way. The host column is the time Python needs for one call.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ceilings import Call, Ceilings, measure_ceilings, median_us
from bench.environment import environment
from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE
from engine.ops import cuda, sampling_line
from engine.sampling_params import SamplingParams

ROTATED_BYTES = 256 << 20  # several times the L2 cache of any GPU
MAX_SETS = 64
HIDDEN, INNER, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128_256
QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
MIXED = [*range(100, 2000, 13), *[1] * 13]  # of 147 requests, and the rows that fill up a graph for 160
DECODES = ([4096], [640] * 64, [4096] * 64, [640] * 256, MIXED)  # contexts
PREFILLS = ((512, [512]), (8192, [8192]), (32, [2048] * 8), (16, [8192]))  # tokens of each request, contexts
SAMPLERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("temperature", {}),
    ("top-p", {"top_p": 0.9}),
    ("top-k, top-p", {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
)


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make` gives a call on fresh inputs, and the same in plain PyTorch if it has it."""

    op: str
    shape: str
    read: float  # bytes, at least
    written: float
    flops: float
    make: Callable[[], tuple[Call, Call | None]]

    @property
    def bytes(self) -> float:
        return self.read + self.written


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
    ceilings = measure_ceilings(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: read {ceilings.read_bytes_per_s / 1e12:.2f} TB/s, ", end="")
    print(f"copy {ceilings.copied_bytes_per_s / 1e12:.2f} TB/s, ", end="")
    print(f"bf16 matrix product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s\n")
    print(f"{'op':<20}{'shape':<28}{'us':>10}{'TB/s':>7}{'TFLOP/s':>9}{'share':>14}{'torch':>8}{'host us':>9}")
    timings = []
    for case in cases():
        if arguments.only not in case.op:
            continue
        timings.append(measure(case, ceilings))
        print(row(timings[-1]), flush=True)
    if arguments.output:
        result = {
            "kind": "kernels",
            "ceilings": asdict(ceilings),
            "rows": [asdict(timing) for timing in timings],
            "environment": environment(),
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def row(timing: Timing) -> str:
    share, ratio = f"{timing.share:.0%} of {timing.bound}", f"{timing.ratio:.2f}x" if timing.ratio else ""
    return (
        f"{timing.op:<20}{timing.shape:<28}{timing.us:>10.1f}{timing.tb_per_s:>7.2f}{timing.tflop_per_s:>9.1f}"
        f"{share:>14}{ratio:>8}{timing.host_us:>9.1f}"
    )


def measure(case: Case, ceilings: Ceilings) -> Timing:
    num_sets = int(min(MAX_SETS, max(2, ROTATED_BYTES // max(case.bytes, 1) + 1)))
    calls, torch_calls = zip(*(case.make() for _ in range(num_sets)), strict=True)
    us = time_calls(calls)
    torch_us = time_calls(torch_calls) if torch_calls[0] else None
    bytes_s, flops_s = ceilings.bytes_s(case.read, case.written), case.flops / ceilings.flops_per_s
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
    """Microseconds of one call: the calls one after the other in a graph, at least 8 of them."""
    rounds = -(-8 // len(calls))
    torch.cuda.synchronize()  # the inputs are still being made, on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]  # kept: each call writes to memory of its own
    us = median_us(graph.replay) / len(kept)
    del kept
    graph.reset()
    return us


def cases() -> Iterator[Case]:
    for num_tokens in (1, 64, 256, 8192):
        for inputs, out in ((HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN)):
            yield _linear_case(num_tokens, inputs, out)
    for num_tokens in (1, 64, 256):
        yield _logits_case(num_tokens)
    for num_tokens in (64, 8192):
        yield from _row_cases(num_tokens)
    for contexts in DECODES:
        yield _attention_case("decode", 1, contexts)
    for length, contexts in PREFILLS:
        yield _attention_case("prefill", length, contexts)
    for num_rows in (1, 64, 256):
        yield _best_case(num_rows)
        for name, params in SAMPLERS:
            yield _sample_case(num_rows, name, SamplingParams(**params))


def _row_cases(num_tokens: int) -> Iterator[Case]:
    column = 2.0 * num_tokens  # bytes of one column of bf16

    def norm() -> tuple[Call, Call]:
        x, weight = _random(num_tokens, HIDDEN), _random(HIDDEN)
        return lambda: cuda.rms_norm(x, weight, 1e-5), lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5)

    def add_norm() -> tuple[Call, Call]:
        x, residual, weight = _random(num_tokens, HIDDEN), _random(num_tokens, HIDDEN), _random(HIDDEN)

        def plain() -> Tensor:
            residual.add_(x)
            return F.rms_norm(residual, (HIDDEN,), weight, 1e-5)

        return lambda: cuda.add_rms_norm(x, residual, weight, 1e-5), plain

    def gate() -> tuple[Call, Call]:
        gate_up = _random(num_tokens, 2 * INNER)
        gate, up = gate_up.chunk(2, dim=-1)
        return lambda: cuda.gated_activation(gate_up, "silu"), lambda: F.silu(gate) * up

    def rotate() -> tuple[Call, None]:
        qkv = _random(num_tokens, QKV)
        caches = _caches(-(-num_tokens // BLOCK_SIZE))
        positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
        blocks = torch.randperm(-(-num_tokens // BLOCK_SIZE), device="cuda").int()  # filled in order, as by a prompt
        offsets = torch.arange(BLOCK_SIZE, device="cuda").int()
        slots = (blocks.unsqueeze(1) * BLOCK_SIZE + offsets).flatten()[:num_tokens]
        cos_sin = torch.rand(8192, HEAD_DIM, device="cuda")
        return lambda: cuda.rotate_and_store(qkv, positions, slots, cos_sin, *caches, None, None, 0.0), None

    table = cache(partial(_random, VOCAB, HIDDEN))  # larger than the GPU's cache by itself

    def embed() -> tuple[Call, None]:
        ids = torch.randint(0, VOCAB, (num_tokens,), dtype=torch.int32, device="cuda")
        return lambda: table().index_select(0, ids), None

    angles = 4.0 * num_tokens * HEAD_DIM  # bytes of cosines and sines, float32
    for op, width, num_read, num_written, other, make in (
        ("rms_norm", HIDDEN, 1, 1, 0.0, norm),
        ("add_rms_norm", HIDDEN, 2, 2, 0.0, add_norm),
        ("gated_activation", INNER, 2, 1, 0.0, gate),
        ("rotate_and_store", QKV, 1, 1, angles, rotate),
        ("embedding (torch)", HIDDEN, 1, 1, 0.0, embed),
    ):
        read, written = num_read * column * width + other, num_written * column * width
        yield Case(op, f"{num_tokens} x {width}", read, written, 0, make)


def _linear_case(num_tokens: int, inputs: int, out: int) -> Case:
    def make() -> tuple[Call, Call]:
        x, weight = _random(num_tokens, inputs), _random(out, inputs)
        return lambda: cuda.linear(x, weight, None), lambda: F.linear(x, weight)

    read, written = 2.0 * (num_tokens + out) * inputs, 2.0 * num_tokens * out
    return Case("linear", f"{num_tokens} x {inputs} to {out}", read, written, 2.0 * num_tokens * inputs * out, make)


def _logits_case(num_tokens: int) -> Case:
    def make() -> tuple[Call, Call]:
        hidden, weight = _random(num_tokens, HIDDEN), _random(VOCAB, HIDDEN)
        return lambda: cuda.logits(hidden, weight), lambda: torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    read, written = 2.0 * (num_tokens + VOCAB) * HIDDEN, 4.0 * num_tokens * VOCAB
    return Case("logits", f"{num_tokens} x {HIDDEN} to {VOCAB}", read, written, 2.0 * num_tokens * HIDDEN * VOCAB, make)


def _attention_case(op: str, length: int, contexts: Sequence[int]) -> Case:
    """The last `length` tokens of requests with these contexts."""
    num_pairs = sum(sum(range(context - length + 1, context + 1)) for context in contexts)
    passed = 2.0 * len(contexts) * length * NUM_HEADS * HEAD_DIM  # bytes of queries, and of results
    keys_and_values = 4.0 * sum(contexts) * NUM_KV_HEADS * HEAD_DIM
    flops = 4.0 * num_pairs * NUM_HEADS * HEAD_DIM
    shortest, longest = min(contexts), max(contexts)
    context = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    shape = f"{len(contexts)} x {length} of {context}"
    return Case(op, shape, passed + keys_and_values, passed, flops, partial(_attention, length, contexts))


def _attention(length: int, contexts: Sequence[int]) -> tuple[Call, Call | None]:
    num_requests, num_tokens = len(contexts), len(contexts) * length
    num_blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    q = _random(num_tokens, NUM_HEADS, HEAD_DIM)
    k_cache, v_cache = _caches(sum(num_blocks))
    blocks = torch.randperm(sum(num_blocks), device="cuda").int().split(num_blocks)
    unused = torch.zeros(num_tokens, dtype=torch.int32, device="cuda")
    batch = ForwardBatch(
        token_ids=unused,
        positions=unused,
        slot_mapping=unused,
        query_start=torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        rows=torch.arange(num_requests, dtype=torch.int32, device="cuda"),
        block_table=torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True),
        num_decodes=num_requests if length == 1 else 0,
        max_query_len=length,
        max_context_len=max(contexts),
    )
    ours = partial(cuda.paged_attention, q, k_cache, v_cache, batch, HEAD_DIM**-0.5, 0, 0.0)
    if any(context != length for context in contexts):
        return ours, None
    # PyTorch's own gets its keys and values contiguous: it knows no blocks.
    heads = q.view(num_requests, length, NUM_HEADS, HEAD_DIM).transpose(1, 2)
    k, v = (cache.view(num_requests, -1, *cache.shape[1:]) for cache in (k_cache, v_cache))
    k, v = (each.transpose(1, 2).flatten(2, 3).contiguous() for each in (k, v))
    return ours, lambda: F.scaled_dot_product_attention(heads, k, v, is_causal=True, enable_gqa=True)


def _best_case(num_rows: int) -> Case:
    def make() -> tuple[Call, Call]:
        logits, rows, ends, token_ids = _sampled(num_rows)
        return lambda: cuda.take_best(logits, rows, ends, token_ids), lambda: logits.argmax(-1)

    return Case("take_best", f"{num_rows} x {VOCAB}", 4.0 * num_rows * VOCAB, 0, 0, make)


def _sample_case(num_rows: int, name: str, params: SamplingParams) -> Case:
    def make() -> tuple[Call, None]:
        logits, rows, ends, token_ids = _sampled(num_rows)
        line = torch.from_numpy(sampling_line.pack(params, 0, [])).cuda()
        lines = F.pad(line, (0, sampling_line.NUM_WORDS - len(line))).repeat(num_rows, 1)
        return lambda: cuda.sample(logits, lines, rows, ends, token_ids), None

    return Case("sample", f"{num_rows} x {VOCAB}, {name}", 4.0 * num_rows * VOCAB, 0, 0, make)


def _sampled(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits as wide as a model's, and where their tokens go."""
    rows = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    token_ids = torch.zeros(num_rows, 2, dtype=torch.int32, device="cuda")
    return 3 * torch.randn(num_rows, VOCAB, device="cuda"), rows, torch.ones_like(rows), token_ids


def _caches(num_blocks: int) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return _random(*shape), _random(*shape)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


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
