"""One measured run against a server: ask once, warm up, drive the load, watch the server's own metrics, sum up.

A run whose client could not keep up is not a measurement of the server: it is returned as invalid, with the reason.
"""

import asyncio
import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from bench.client import LagMeter, LoadClient, closed_loop, open_loop
from bench.metrics import RequestRecord, serving_metrics
from bench.workloads import BenchRequest, warm_up_requests
from engine.errors import UserError

WARM_UP_REQUESTS = 16
WARM_UP_TOKENS = 16
SCRAPE_PERIOD_S = 0.25
PROGRESS_PERIOD_S = 0.2
# A client that is late by more than half of the longest gaps it reports has measured itself.
MAX_LAG_PER_P99_ITL = 0.5
MAX_CPU_SHARE = 0.9
# Fields that vLLM and we know and others may refuse: which tokens came in a chunk, and a salt that keeps a run from
# finding the prefixes that an earlier run with the same seed has left in the cache.
OPTIONAL_FIELDS = {"return_token_ids": True}


@dataclass(frozen=True)
class Load:
    """How requests are sent: `concurrency` of them at any time, or `request_rate` a second whatever comes back."""

    concurrency: int | None = None
    request_rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class RunProgress:
    """Where a run is, for whoever shows it."""

    stage: str  # "warm-up" or "measuring"
    num_done: int
    num_failed: int
    num_requests: int
    num_output_tokens: int
    elapsed_s: float


@dataclass
class ServingRun:
    """What was measured; `metrics` sums it up."""

    records: list[RequestRecord] = field(default_factory=list)
    lag: LagMeter = field(default_factory=LagMeter)
    scrapes: list[dict[str, float]] = field(default_factory=list)  # the server's metrics, from before to after the run
    num_failed: int = 0
    num_output_tokens: int = 0

    def add(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.num_failed += bool(record.error)
        self.num_output_tokens += record.num_output_tokens

    def metrics(self) -> dict[str, Any]:
        reasons = self.invalid_reasons()
        return {
            **serving_metrics(self.records),
            **server_metrics(self.scrapes),
            "client_lag_ms": self.lag.percentile(99) * 1e3,
            "client_cpu_perc": self.lag.cpu_share * 100,
            "valid": not reasons,
            "invalid_reasons": reasons,
            "errors": self.errors(),
        }

    def invalid_reasons(self) -> list[str]:
        """Why the figures say nothing about the server; empty when they do."""
        if all(record.error for record in self.records):
            return ["no request completed"]
        reasons = []
        gaps = [gap for record in self.records if not record.error for gap in record.gaps]
        lag, itl = self.lag.percentile(99), float(np.percentile(gaps, 99)) if gaps else math.inf
        if lag > MAX_LAG_PER_P99_ITL * itl:
            reasons.append(
                f"the client was late by {lag * 1e3:.1f} ms, with {itl * 1e3:.1f} ms between tokens (both p99)"
            )
        if self.lag.cpu_share > MAX_CPU_SHARE:
            reasons.append(f"the client used {self.lag.cpu_share:.0%} of a core: it could not send or read faster")
        return reasons

    def errors(self) -> dict[str, int]:
        """How often each failure was seen."""
        errors = [record.error for record in self.records if record.error]
        return {error: errors.count(error) for error in dict.fromkeys(errors)}


async def measure(
    url: str,
    model: str,
    requests: list[BenchRequest],
    load: Load,
    *,
    api_key: str = "",
    on_progress: Callable[[RunProgress], None] = lambda progress: None,
) -> ServingRun:
    """Drive the server at `url`. Raises UserError when it refuses the workload's first request."""
    run = ServingRun()
    async with LoadClient(url.rstrip("/"), model, api_key) as client:
        await _warm_up(client, requests, load, on_progress)
        async with _scraping(client, run), run.lag, _reporting(run, len(requests), on_progress):
            if load.request_rate is None:
                await closed_loop(client, requests, load.concurrency or 1, run.add)
            else:
                await open_loop(client, requests, load.request_rate, load.seed, run.lag, run.add)
    return run


async def served_model(url: str, api_key: str = "") -> dict[str, Any]:
    """The first entry of the server's /v1/models. Raises UserError when there is no such server."""
    async with LoadClient(url.rstrip("/"), "", api_key, timeout_s=30) as client:
        try:
            models = json.loads(await client.get("/v1/models"))["data"]
            return dict(models[0])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"no OpenAI-compatible server answers at {url} ({error}): start one with `vcli serve`, or leave --url "
                "away to have one started"
            ) from None


async def _warm_up(
    client: LoadClient, requests: list[BenchRequest], load: Load, on_progress: Callable[[RunProgress], None]
) -> None:
    num_requests = min(load.concurrency or WARM_UP_REQUESTS, WARM_UP_REQUESTS, len(requests))
    first, *others = warm_up_requests(requests, num_requests, output_len=WARM_UP_TOKENS)
    on_progress(RunProgress("warm-up", 0, 0, num_requests, 0, 0.0))
    client.extensions = {**OPTIONAL_FIELDS, "cache_salt": uuid.uuid4().hex}
    record = await client.send(first)
    if record.error.startswith("HTTP 4"):
        client.extensions = {}
        record = await client.send(first)
    if record.error:
        raise UserError(f"the server at {client.url} does not answer the workload: {record.error}")
    await closed_loop(client, others, len(others), lambda record: None)


@contextlib.asynccontextmanager
async def _reporting(
    run: ServingRun, num_requests: int, on_progress: Callable[[RunProgress], None]
) -> AsyncIterator[None]:
    """Tell `on_progress` a few times a second, whatever the number of tokens."""
    start = time.perf_counter()

    def report() -> None:
        elapsed, num_done = time.perf_counter() - start, len(run.records)
        on_progress(RunProgress("measuring", num_done, run.num_failed, num_requests, run.num_output_tokens, elapsed))

    async def keep_reporting() -> None:
        while True:
            report()
            await asyncio.sleep(PROGRESS_PERIOD_S)

    task = asyncio.create_task(keep_reporting())
    try:
        yield
    finally:
        task.cancel()
        report()


@contextlib.asynccontextmanager
async def _scraping(client: LoadClient, run: ServingRun) -> AsyncIterator[None]:
    """Read the server's /metrics before, during and after the run; a server without them goes unscraped."""

    async def scrape() -> bool:
        try:
            run.scrapes.append(parse_metrics(await client.get("/metrics")))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False
        return True

    async def keep_scraping() -> None:
        while True:
            await asyncio.sleep(SCRAPE_PERIOD_S)
            await scrape()

    if not await scrape():
        yield
        return
    task = asyncio.create_task(keep_scraping())
    try:
        yield
    finally:
        task.cancel()
        await scrape()


_SAMPLE = re.compile(r"^(?:vcli|vllm):(\w+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_SCRAPED = {
    "num_requests_running",
    "kv_cache_usage_perc",
    "kv_cache_waste_perc",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
}


def parse_metrics(text: str) -> dict[str, float]:
    """The gauges and counters that a run is judged by, out of Prometheus' text format (labels are summed over)."""
    values: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        if name in _SCRAPED:
            values[name] = values.get(name, 0.0) + float(value)
    return values


def server_metrics(scrapes: list[dict[str, float]]) -> dict[str, float | int | None]:
    """What the server says of itself: KV waste and use while it had work, and what its counters gained."""
    busy = [scrape for scrape in scrapes if scrape.get("num_requests_running", 0) > 0]

    def while_busy(name: str) -> list[float]:
        return [scrape[name] * 100 for scrape in busy if name in scrape]

    def gained(name: str) -> float | None:
        return scrapes[-1][name] - scrapes[0][name] if scrapes and name in scrapes[0] else None

    wastes, usages = while_busy("kv_cache_waste_perc"), while_busy("kv_cache_usage_perc")
    preemptions = gained("num_preemptions_total")
    queries, hits = gained("prefix_cache_queries_total"), gained("prefix_cache_hits_total")
    return {
        "kv_waste_perc": sum(wastes) / len(wastes) if wastes else None,
        "peak_kv_waste_perc": max(wastes, default=None),
        "peak_kv_usage_perc": max(usages, default=None),
        "prefix_cache_hit_perc": hits / queries * 100 if queries and hits is not None else None,
        "num_preemptions": None if preemptions is None else int(preemptions),
    }
