"""What is it worth to keep KV blocks in memory of the host? The same work with --host-kv-memory and without.

    python -m bench.paging MODEL --load-format dummy --output paging.json

Two engines in this process take turns. Their caches are small on purpose, so that three kinds of work tell:

- crowd: three times as many tokens as there is room for at once, so that requests preempt each other;
- return: prompts that have been there before, and were forgotten meanwhile for others;
- steady: requests that have room, in blocks that remember others, which nobody wants: what it costs to keep them.

Exit codes: bench/command.py; 3 if the engines' tokens differ although --batch-invariant promises that they cannot.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import command
from bench.report import markdown_table
from engine.config import BLOCK_SIZE, EngineConfig
from engine.errors import UserError
from engine.growth import AnswerLength
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore

ROUNDS = 2  # of each kind of work, with new prompts; the quicker one counts
DEMAND = 3  # times what the cache holds
WAYS = ("computed again", "from the host")


@dataclass(frozen=True)
class Row:
    """One kind of work, done in one of the WAYS."""

    work: str
    way: str
    seconds: float
    num_output_tokens: int
    mean_ttft_ms: float  # from the first step on: all requests are there at once
    p50_step_ms: float
    p99_step_ms: float
    max_step_ms: float
    num_preemptions: int
    num_prefix_hits: int  # tokens found, of the tokens looked up
    num_looked_up: int
    num_blocks_paged_out: int
    num_blocks_paged_in: int


@dataclass(frozen=True)
class Work:
    """Requests that are sent at once; `before` are run first, and are not measured."""

    name: str
    requests: list[AddRequest]
    before: list[AddRequest]


def works(num_cache_tokens: int, input_len: int, output_len: int, prefix_len: int, seed: int) -> Iterator[Work]:
    """The three kinds of work for a cache of so many tokens, with prompts of their own for each seed."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(100, 1000) for _ in range(length)]

    def request(tokens: list[int], max_tokens: int) -> AddRequest:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        return AddRequest(f"{rng.getrandbits(64):x}", tokens, params)

    num = DEMAND * num_cache_tokens // (input_len + output_len)
    yield Work("crowd", [request(prompt(input_len), output_len) for _ in range(num)], [])

    prefixes = [prompt(prefix_len) for _ in range(DEMAND * num_cache_tokens // prefix_len)]
    first, again = ([request(prefix + prompt(32), 8) for prefix in prefixes] for _ in range(2))
    yield Work("return", again, first)

    others = [request(prompt(prefix_len), 1) for _ in range(num_cache_tokens // prefix_len + 1)]
    num = max(num_cache_tokens // 2 // (input_len + output_len), 1)
    yield Work("steady", [request(prompt(input_len), output_len) for _ in range(num)], others)


def run(core: "EngineCore", requests: list[AddRequest]) -> tuple[dict[str, list[int]], dict[str, float], list[float]]:
    """Each request's tokens, the seconds until its first one, and the seconds of each step."""
    for request in requests:
        core.add(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    first: dict[str, float] = {}
    steps = []
    start = last = time.perf_counter()
    while core.has_work:
        outputs = core.step()
        now = time.perf_counter()
        steps.append(now - last)
        last = now
        for output in outputs:
            first.setdefault(output.request_id, now - start)
            tokens[output.request_id] += output.token_ids
    return tokens, first, steps


def measure(core: "EngineCore", work: Work, way: str) -> tuple[Row, list[list[int]]]:
    """The row of a kind of work, and the tokens of its requests."""
    run(core, work.before)
    core.scheduler.answer_length = AnswerLength()
    core.scheduler.answer_length.add(1)  # whoever expects short answers lets a crowd in, and has to preempt
    before = counts(core)
    tokens, first, steps = run(core, work.requests)
    gained = {name: value - before[name] for name, value in counts(core).items()}
    by_length = sorted(steps)
    row = Row(
        work=work.name,
        way=way,
        seconds=sum(steps),
        num_output_tokens=sum(map(len, tokens.values())),
        mean_ttft_ms=statistics.mean(first.values()) * 1e3,
        p50_step_ms=by_length[len(by_length) // 2] * 1e3,
        p99_step_ms=by_length[len(by_length) * 99 // 100] * 1e3,
        max_step_ms=by_length[-1] * 1e3,
        **gained,
    )
    return row, list(tokens.values())


def counts(core: "EngineCore") -> dict[str, int]:
    """What the engine has counted, by the names that a Row has for it."""
    stats = core.stats
    return {
        "num_preemptions": stats.num_preemptions,
        "num_prefix_hits": stats.prefix_cache_hits,
        "num_looked_up": stats.prefix_cache_queries,
        "num_blocks_paged_out": stats.num_blocks_paged_out,
        "num_blocks_paged_in": stats.num_blocks_paged_in,
    }


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    return command.run("paging", options.output, partial(compare, options))


def compare(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The result for its file, and whether no token is wrong. Raises UserError if there is nothing to compare."""
    plain_s, plain = timed_engine(options, None)
    paging_s, paging = timed_engine(options, int(options.host_kv_gib * 2**30))
    pinning_s = seconds_until_ready(paging)
    if paging.worker.host_cache is None:
        raise UserError("there is nothing to compare: the engine does without the host's memory, and has said why")
    num_cache_tokens = plain.ready.num_blocks * BLOCK_SIZE
    facts = {
        "num_cache_tokens": num_cache_tokens,
        "num_host_tokens": paging.worker.num_host_blocks * BLOCK_SIZE,
        "block_bytes": paging.worker.host_cache.block_bytes,
        "block_seconds": paging.worker.block_seconds,
        "min_paged_in": paging.worker.min_paged_in,
        "start_s": plain_s,
        "start_with_host_s": paging_s,
        "pinning_s": pinning_s,
    }
    print(json.dumps(facts), file=sys.stderr)

    rows: dict[tuple[str, str], Row] = {}
    num_requests = num_equal = 0
    for seed in range(ROUNDS):
        for work in works(num_cache_tokens, options.input_len, options.output_len, options.prefix_len, seed):
            measured = [measure(core, work, way) for core, way in zip((plain, paging), WAYS, strict=True)]
            for row, _ in measured:
                place = (row.work, row.way)
                rows[place] = min(rows.get(place, row), row, key=lambda each: each.seconds)
            pairs = zip(*(tokens for _, tokens in measured), strict=True)
            num_requests += len(work.requests)
            num_equal += sum(one == other for one, other in pairs)
    table_rows = [asdict(row) for row in rows.values()]
    print(
        table(table_rows),
        f"{num_equal:,} of {num_requests:,} requests have the same tokens both ways",
        sep="\n\n",
    )
    flags = {name: value for name, value in vars(options).items() if name != "output"}
    result: dict[str, Any] = {"options": flags, "facts": facts, "rows": table_rows}
    result |= {"num_requests": num_requests, "num_equal": num_equal}
    return result, not options.batch_invariant or num_equal == num_requests


def timed_engine(options: argparse.Namespace, host_kv_memory: int | None) -> "tuple[float, EngineCore]":
    from engine.core import EngineCore

    start = time.perf_counter()
    names = ("model", "load_format", "device", "dtype", "kv_cache_dtype", "max_model_len", "batch_invariant")
    config = EngineConfig(
        **{name: getattr(options, name) for name in names},
        kv_cache_memory=int(options.kv_cache_gib * 2**30),
        host_kv_memory=host_kv_memory,
    )
    core = EngineCore(config)
    return time.perf_counter() - start, core


def seconds_until_ready(core: "EngineCore") -> float:
    """Memory of the host is pinned while an engine serves already; this one waits for it."""
    start = time.perf_counter()
    while core.worker.host_cache is not None and not core.worker.host_cache.is_ready:
        time.sleep(0.01)
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of work in each of the WAYS."""
    columns = ["work", "forgotten KV is", "s", "output tok/s", "TTFT mean ms", "step p50 ms", "p99", "max"]
    columns += ["preempted", "found", "blocks out", "in"]
    keys = ["mean_ttft_ms", "p50_step_ms", "p99_step_ms", "max_step_ms", "num_preemptions"]
    lines = [
        [
            *(row["work"], row["way"], row["seconds"], row["num_output_tokens"] / row["seconds"]),
            *(row[key] for key in keys),
            f"{row['num_prefix_hits'] / row['num_looked_up']:.0%}",
            *(row["num_blocks_paged_out"], row["num_blocks_paged_in"]),
        ]
        for row in rows
    ]
    return markdown_table(columns, lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command.parser("paging", __doc__, starts_server=False)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--kv-cache-gib", type=float, default=4.0, help="of the small cache of each engine")
    parser.add_argument("--host-kv-gib", type=float, default=32.0, help="of the host's memory")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of a prompt in the crowd")
    parser.add_argument("--output-len", type=int, default=384, help="and of its answer")
    parser.add_argument("--prefix-len", type=int, default=4096, help="tokens of a prompt that returns")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
