"""What the dashboard costs: throughput with its page open against without, in turns on one server under load.

    python -m bench.dashboard [MODEL] --pairs 40 --output dashboard.json -- --device cpu     flags of vcli serve last

A viewer reads the server's feed as the page does; the browser is left out, which runs on the viewer's machine. A pair
is a window with the page open and one without, in either order. Throughput is compared, and, because other work on a
machine takes from one window more than from another, tokens for each CPU second that the server had, and what the page
can take from it: CPU time of the API process beyond what it needs for as many tokens, and time of the engine's thread
for messages, both as shares of one CPU's time. The limit is for these two together.
Exit codes: bench/command.py; 3 certainly above the limit, 4 the spread is too large to tell.
"""

import asyncio
import contextlib
import math
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import psutil

from bench import command
from bench.client import LoadClient
from bench.run_async import run_async
from bench.scrape import by_label, totals
from bench.server import API, running_server, titled
from bench.workloads import BenchRequest
from engine.errors import UserError

SETTLE_S = 0.5  # between two windows
WARM_UP_S = 3.0
CONFIDENCE = 1.96  # standard errors of a mean, for 95 %


@dataclass(frozen=True)
class Plan:
    """What is sent, and how long it is watched."""

    num_pairs: int = 40
    window_s: float = 4.0
    concurrency: int = 16
    input_len: int = 16  # tokens
    output_len: int = 256
    num_viewers: int = 1
    limit: float = 0.005  # of the throughput


@dataclass(frozen=True)
class Window:
    """Some time of a server's life."""

    tokens_per_s: float
    cpu_share: float  # CPU seconds a second of all its processes
    api_share: float  # CPU seconds a second of the API process
    receive_share: float  # seconds a second of the engine's thread for messages that come in


class _Run:
    def __init__(self, url: str, server: psutil.Process, plan: Plan) -> None:
        self.url, self.server, self.plan = url, server, plan
        self.random = random.Random(0)
        self.num_bytes = 0  # that viewers have read

    async def run(self) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as self.session, self._load():
            await asyncio.sleep(WARM_UP_S)
            pairs = [await self._pair(number) for number in range(self.plan.num_pairs)]
        return report(pairs, self.plan) | {"feed_bytes": self.num_bytes}

    async def _pair(self, number: int) -> tuple[Window, Window]:
        """With the page open, and without; every second time the other way round."""
        windows = {}
        for is_open in (number % 2 == 0, number % 2 == 1):
            async with self._viewers() if is_open else contextlib.nullcontext():
                await asyncio.sleep(SETTLE_S)
                windows[is_open] = await self._window()
        return windows[True], windows[False]

    async def _window(self) -> Window:
        before, start = await self._counts(), time.perf_counter()
        await asyncio.sleep(self.plan.window_s)
        after, took_s = await self._counts(), time.perf_counter() - start
        return Window(*((b - a) / took_s for a, b in zip(before, after, strict=True)))

    @contextlib.asynccontextmanager
    async def _viewers(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._view()) for _ in range(self.plan.num_viewers)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _view(self) -> None:
        async with self.session.get(f"{self.url}/dashboard/events", raise_for_status=True) as reply:
            async for data in reply.content.iter_any():
                self.num_bytes += len(data)

    @contextlib.asynccontextmanager
    async def _load(self) -> AsyncIterator[None]:
        async with LoadClient(self.url, "", extensions={"return_token_ids": True}) as client:
            users = [asyncio.create_task(self._use(client)) for _ in range(self.plan.concurrency)]
            try:
                yield
                if failed := next((user for user in users if user.done()), None):
                    await failed
            finally:
                for user in users:
                    user.cancel()

    async def _use(self, client: LoadClient) -> None:
        """One request after the other. Their lengths differ, so that they do not end all at once."""
        while True:
            prompt = [self.random.randint(3, 200) for _ in range(self.plan.input_len)]
            length = round(self.plan.output_len * self.random.uniform(0.5, 1.5))
            record = await client.send(BenchRequest(length, prompt))
            if record.error:
                raise UserError(f"a request failed: {record.error}")

    async def _counts(self) -> tuple[float, float, float, float]:
        """Tokens; CPU seconds of all processes, and of the API process; the engine's seconds for messages."""
        async with self.session.get(f"{self.url}/metrics", raise_for_status=True) as reply:
            text = await reply.text()
        api_s, *others_s = map(_cpu_s, [self.server, *self.server.children()])
        stages = by_label(text, "engine_stage_seconds_total", "stage")
        return totals(text)["generation_tokens_total"], api_s + sum(others_s), api_s, stages["receive"]


def report(pairs: list[tuple[Window, Window]], plan: Plan) -> dict[str, Any]:
    """What came of it: means over the pairs, with the page first, and their 95 % intervals."""
    api = _mean([on.api_share - off.api_share * on.tokens_per_s / off.tokens_per_s for on, off in pairs])
    engine = _mean([on.receive_share - off.receive_share for on, off in pairs])
    low, high = api["low"] + engine["low"], api["high"] + engine["high"]
    return {
        "tokens_per_s": statistics.mean(window.tokens_per_s for pair in pairs for window in pair),
        "ratio_of_tokens_per_s": _mean([on.tokens_per_s / off.tokens_per_s for on, off in pairs]),
        "ratio_of_tokens_per_cpu_s": _mean(
            [on.tokens_per_s / on.cpu_share * off.cpu_share / off.tokens_per_s for on, off in pairs]
        ),
        "cost_in_api_process": api,
        "cost_in_engine": engine,
        "verdict": "within" if high <= plan.limit else "over" if low > plan.limit else "undecided",
        "columns": [f"{name} {kind}" for kind in ("with", "without") for name in asdict(pairs[0][0])],
        "pairs": [[float(f"{x:.4g}") for window in pair for x in asdict(window).values()] for pair in pairs],
    }


def _mean(values: list[float]) -> dict[str, float]:
    mean = statistics.mean(values)
    error = CONFIDENCE * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": mean, "low": mean - error, "high": mean + error}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _sentences(result: dict[str, Any], plan: Plan) -> list[str]:
    def ratio(name: str) -> str:
        return "{mean:.4f} ({low:.4f} to {high:.4f})".format(**result[name])

    def share(name: str) -> str:
        return "{mean:.3%} ({low:.3%} to {high:.3%})".format(**result[name])

    return [
        f"{len(result['pairs'])} pairs of {plan.window_s:g} s at {result['tokens_per_s']:,.0f} tokens a second, "
        f"{plan.num_viewers} with the page open",
        f"tokens a second, with the page / without: {ratio('ratio_of_tokens_per_s')}",
        f"tokens a CPU second, with the page / without: {ratio('ratio_of_tokens_per_cpu_s')}",
        f"the page takes of a CPU, in the API process: {share('cost_in_api_process')}",
        f"and of the engine's thread: {share('cost_in_engine')}",
        f"limit for both: {plan.limit:.1%}; verdict: {result['verdict']}",
    ]


def main(arguments: list[str]) -> int:
    parser = command.parser("dashboard", __doc__)
    parser.add_argument("--pairs", type=int, default=Plan.num_pairs)
    parser.add_argument("--window", type=float, default=Plan.window_s, help="seconds of each half of a pair")
    parser.add_argument("--concurrency", type=int, default=Plan.concurrency)
    parser.add_argument("--viewers", type=int, default=Plan.num_viewers)
    options, served = command.parse(parser, arguments)
    plan = Plan(
        num_pairs=options.pairs,
        window_s=options.window,
        concurrency=options.concurrency,
        num_viewers=options.viewers,
    )

    def measure() -> tuple[dict[str, Any], bool | None]:
        with running_server(served) as url:
            [server] = titled(API)
            try:
                result = run_async(_Run(url, server, plan).run())
            except aiohttp.ClientError as error:
                raise UserError(f"the server does not answer: {error}") from None
        print("\n".join(_sentences(result, plan)))
        is_fine = {"within": True, "over": False, "undecided": None}[result["verdict"]]
        return {"plan": asdict(plan), "result": result}, is_fine

    return command.run("dashboard", options.output, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
