"""Prefill and decode by batch size, in the manner of llama-bench: without a server, tokenizer or sampling parameters.

`pp512` computes so many prompts of 512 tokens to their first token; `tg128` then generates 128 tokens for each of them,
all at once, from prompts that are in the prefix cache. Each is done several times.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench import throughput
from bench.floor import Floor
from bench.workloads import random_requests
from engine.core import EngineCore
from engine.errors import UserError

REPEATS = 5
DEFINITIONS = {
    "pp": "prompts of so many tokens each, computed to their first token: tokens a second, and ms for all of them",
    "tg": "so many tokens generated for each sequence after its prompt (@): tokens a second, and ms for one step",
    "±": f"standard deviation of {REPEATS} repetitions, after one that does not count",
}
FLOOR_DEFINITION = {
    "floor": "the same by the bytes and FLOPs of the work at the GPU's measured ceilings",
}


@dataclass(frozen=True)
class Row:
    """One test at one batch size."""

    test: str
    batch_size: int
    tokens_per_s: float
    std_tokens_per_s: float
    ms: float  # mean of the repetitions: all prompts, or one step
    floor_ms: float | None = None


def measure(
    core: EngineCore,
    batch_sizes: tuple[int, ...],
    *,
    input_len: int,
    output_len: int,
    seed: int,
    floor: Floor | None = None,
    on_progress: Callable[[str, int, int], None] = lambda test, done, total: None,
) -> list[dict[str, Any]]:
    """Two rows a batch size. Raises UserError where a batch does not fit. `on_progress` gets a test, done and all."""
    rows, total = [], len(batch_sizes) * (1 + REPEATS)
    for index, batch_size in enumerate(batch_sizes):
        prefills, decodes = [], []
        for repeat in range(1 + REPEATS):
            on_progress(f"batch {batch_size}", index * (1 + REPEATS) + repeat, total)
            prefill, decode = _repeat(core, batch_size, input_len, output_len, seed=seed + total * index + repeat)
            prefills.append(prefill)
            decodes.append(decode)
        context = input_len + output_len / 2
        rows += [
            _row(f"pp{input_len}", batch_size, prefills[1:], batch_size * input_len),
            _row(f"tg{output_len} @ {input_len}", batch_size, decodes[1:], batch_size),
        ]
        if floor:
            rows[-1] = replace(rows[-1], floor_ms=floor.decode_step_s(batch_size, context) * 1e3)
            if batch_size == 1:
                rows[-2] = replace(rows[-2], floor_ms=floor.prefill_s(input_len) * 1e3)
    return [asdict(row) for row in rows]


def _row(test: str, batch_size: int, seconds: list[float], num_tokens: int) -> Row:
    rates = [num_tokens / each for each in seconds]
    return Row(test, batch_size, statistics.mean(rates), statistics.stdev(rates), statistics.mean(seconds) * 1e3)


def _repeat(core: EngineCore, batch_size: int, input_len: int, output_len: int, seed: int) -> tuple[float, float]:
    """Seconds of the prompts and of the mean decode step of a full batch."""
    # The token that ends a prompt's step is not one of the decode steps.
    requests = random_requests(
        batch_size, input_len=input_len, output_len=output_len + 1, vocab_size=core.ready.vocab_size, seed=seed
    )
    prompts = throughput.measure(core, [replace(request, output_len=1) for request in requests])
    steps = throughput.decode_steps(throughput.measure(core, requests), batch_size)
    if len(steps) < output_len:
        raise UserError(
            f"batch size {batch_size}: {len(steps)} of {output_len} steps had a full batch: --max-num-seqs "
            f"({core.ready.max_num_seqs:,}) or the KV cache ({core.ready.num_blocks:,} blocks of "
            f"{core.ready.block_size}) is too small for it, or the prompts are not kept (--enable-prefix-caching)"
        )
    return sum(step.seconds for step in prompts), statistics.mean(step.seconds for step in steps)
