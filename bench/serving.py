"""One measured run against a server: ask once, warm up, drive the load, watch the server's own metrics, sum up.

The requests of the run are sent by processes of their own; this one reads what they report and the server's metrics.

A run whose client could not keep up is not a measurement of the server: it is returned as invalid, with the reason.
"""

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from bench.client import LoadClient, spread
from bench.client_processes import ClientProcesses
from bench.load import LagMeter, Load
from bench.metrics import RequestRecord, Window, is_ramped_up, serving_metrics
from bench.scrape import totals
from bench.workloads import BenchRequest, warm_up_requests
from engine.errors import UserError

WARM_UP_REQUESTS = 16
WARM_UP_TOKENS = 16
SCRAPE_PERIOD_S = 0.25
PROGRESS_PERIOD_S = 0.2
# A client that is late by more than half of the longest gaps it reports has measured itself. One that is late much of
# the time makes its longest gaps itself, and is told by the usual ones.
MAX_LAG_PER_P99_ITL = 0.5
MAX_MEAN_LAG_PER_P50_ITL = 0.1
MAX_CPU_SHARE = 0.9
MAX_FAILURES_IN_A_ROW = 1000  # then nobody is there any more, and no more is sent
# Fields that vLLM and we know and others may refuse: which tokens came in a chunk, and a salt that keeps a run from
# finding the prefixes that an earlier run with the same seed has left in the cache.
OPTIONAL_FIELDS = {"return_token_ids": True}


@dataclass(frozen=True)
class RunProgress:
    """Where a run is, for whoever shows it."""

    stage: str  # "warm-up", "ramp-up" or "measuring"
    num_done: int
    num_failed: int
    num_requests: int | None  # None: as many as there is time for
    num_output_tokens: int
    elapsed_s: float


@dataclass
class ServingRun:
    """What was measured; `metrics` sums it up."""

    records: list[RequestRecord] = field(default_factory=list)
    lags: list[LagMeter] = field(default_factory=list)  # one a client process
    scrapes: list[dict[str, float]] = field(default_factory=list)  # the server's metrics, from before to after the run
    start: float = 0.0  # of the clock that all times are of
    window: Window | None = None  # what counts of the run; None: all of it
    num_failed: int = 0
    num_failed_in_a_row: int = 0
    num_output_tokens: int = 0

    @property
    def is_hopeless(self) -> bool:
        return self.num_failed_in_a_row >= MAX_FAILURES_IN_A_ROW

    def add(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.num_failed += bool(record.error)
        self.num_failed_in_a_row = self.num_failed_in_a_row + 1 if record.error else 0
        self.num_output_tokens += record.num_output_tokens

    def metrics(self, slo: dict[str, float] | None = None) -> dict[str, Any]:
        """The figures; `slo` gives the seconds that a request's ttft, tpot, itl or e2el may take."""
        reasons = self.invalid_reasons()
        return {
            **serving_metrics(self.records, self.window, slo),
            **server_metrics(self.scrapes),
            "client_lag_ms": max((lag.percentile(99) for lag in self.lags), default=0.0) * 1e3,
            "client_cpu_perc": max((lag.cpu_share for lag in self.lags), default=0.0) * 100,
            "num_client_processes": len(self.lags),
            "valid": not reasons,
            "invalid_reasons": reasons,
            "errors": self.errors(),
        }

    def samples(self) -> dict[str, Any]:
        """What the figures were made from. Seconds, to the microsecond; times from the start of the run."""
        requests = sorted(self.records, key=lambda record: record.sent)
        names = sorted({name for scrape in self.scrapes for name in scrape if name != "time"})
        return {
            "requests": {
                "sent": [_rounded(record.sent - self.start) for record in requests],
                "ttft": [_rounded(record.ttft) if record.chunks else None for record in requests],
                "e2el": [_rounded(record.e2el) if record.chunks else None for record in requests],
                "num_prompt_tokens": [record.num_prompt_tokens for record in requests],
                "num_output_tokens": [record.num_output_tokens for record in requests],
                "error": [record.error for record in requests],
            },
            # Of one completed request after the other, in the order of `requests`.
            "gaps": [_rounded(gap) for record in requests if not record.error for gap in record.gaps],
            "server": {
                "time": [_rounded(scrape["time"] - self.start) for scrape in self.scrapes],
                **{name: [scrape.get(name) for scrape in self.scrapes] for name in names},
            },
            "window": [_rounded(edge - self.start) for edge in self.window] if self.window else None,
        }

    def invalid_reasons(self) -> list[str]:
        """Why the figures say nothing about the server; empty when they do."""
        if all(record.error for record in self.records):
            return ["no request completed"]
        if self.window and all(record.error for record in self.records if record.sent in self.window):
            return ["no request that was sent in the time measured completed: --duration is too short for the load"]
        reasons = []
        if self.is_hopeless:
            reasons.append(f"given up after {MAX_FAILURES_IN_A_ROW:,} failures in a row")
        gaps = [gap for record in self.records if not record.error for gap in record.gaps]
        p50_itl, p99_itl = np.percentile(gaps, [50, 99]).tolist() if gaps else (math.inf, math.inf)
        lag = max((lag.percentile(99) for lag in self.lags), default=0.0)
        mean_lag = max((lag.mean for lag in self.lags), default=0.0)
        cpu_share = max((lag.cpu_share for lag in self.lags), default=0.0)
        if lag > MAX_LAG_PER_P99_ITL * p99_itl:
            reasons.append(
                f"the client was late by {lag * 1e3:.1f} ms, with {p99_itl * 1e3:.1f} ms between tokens (both p99)"
            )
        elif mean_lag > MAX_MEAN_LAG_PER_P50_ITL * p50_itl:
            gap = f"{p50_itl * 1e3:.1f} ms between tokens (p50)"
            reasons.append(f"the client was late by {mean_lag * 1e3:.1f} ms on average, with {gap}")
        if cpu_share > MAX_CPU_SHARE:
            reasons.append(f"the client used {cpu_share:.0%} of a core: it could not send or read faster")
        return reasons

    def errors(self) -> dict[str, int]:
        """How often each failure was seen."""
        return dict(Counter(record.error for record in self.records if record.error))


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


async def measure(
    url: str,
    model: str,
    requests: list[BenchRequest],
    load: Load,
    *,
    api_key: str = "",
    count_tokens: Callable[[str], int] | None = None,
    extensions: dict[str, Any] | None = None,
    on_progress: Callable[[RunProgress], None] = lambda progress: None,
) -> ServingRun:
    """Drive the server at `url`. Raises UserError when it refuses the workload's first request.

    `count_tokens` is for a server that does not report how many it took in and gave out. `extensions` are the fields
    that this server's requests need (None: one that it refuses); without them ours are tried.
    """
    run, url = ServingRun(), url.rstrip("/")
    task: dict[str, Any] = {"url": url, "model": model, "api_key": api_key, "keeps_uncounted": count_tokens is not None}
    async with LoadClient(**task, extensions=extensions or {}) as client:
        await _warm_up(client, requests, load, on_progress, is_known=extensions is not None)
        task["extensions"] = client.extensions
        async with ClientProcesses(task, requests, load) as processes:
            ramp = _Ramp(run, load, processes)
            num_requests = sum(len(r.turns) for r in requests) if load.duration_s is None else None
            async with _scraping(client, run), _reporting(run, ramp, num_requests, on_progress):
                run.start, run.lags = await processes.run(ramp.add)
    if count_tokens is not None:
        for record in run.records:
            _count(record, count_tokens)
    return run


def _count(record: RequestRecord, count_tokens: Callable[[str], int]) -> None:
    """Tokens where the server did not tell: of a prompt of token ids each, of a chat those of its messages alone."""
    if record.uncounted is None:
        return
    prompt, text = record.uncounted
    record.num_prompt_tokens = record.num_prompt_tokens or count_tokens(prompt)
    record.chunks = spread(record.chunks, max(1, count_tokens(text)))
    record.uncounted = None


class _Ramp:
    """With `duration_s`: what counts begins once requests end as fast as they begin, and lasts so long."""

    def __init__(self, run: ServingRun, load: Load, processes: ClientProcesses) -> None:
        self.run, self.duration_s, self.turnstile = run, load.duration_s, processes.turnstile
        self.start = time.perf_counter()
        self.num_ended = 0  # conversations

    def add(self, record: RequestRecord) -> None:
        self.run.add(record)
        self.num_ended += record.ends_conversation
        if self.run.is_hopeless:
            self.turnstile.close_at(0.0)
        self.check()

    def check(self) -> None:
        if self.duration_s is None or self.run.window or self.run.is_hopeless:
            return
        now = time.perf_counter()
        if is_ramped_up(self.turnstile.num_taken, self.num_ended) or now - self.start > self.duration_s:
            self.run.window = Window(now, now + self.duration_s)
            self.turnstile.close_at(self.run.window.end)

    @property
    def stage(self) -> str:
        return "measuring" if self.duration_s is None or self.run.window else "ramp-up"


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
    client: LoadClient,
    requests: list[BenchRequest],
    load: Load,
    on_progress: Callable[[RunProgress], None],
    is_known: bool,
) -> None:
    num_requests = min(load.concurrency or WARM_UP_REQUESTS, WARM_UP_REQUESTS, len(requests))
    first, *others = warm_up_requests(requests, num_requests, output_len=WARM_UP_TOKENS)
    on_progress(RunProgress("warm-up", 0, 0, num_requests, 0, 0.0))
    if not is_known:
        client.extensions = {**OPTIONAL_FIELDS, "cache_salt": uuid.uuid4().hex}
    record = await client.send(first)
    if record.error.startswith("HTTP 4") and not is_known:
        client.extensions = {}
        record = await client.send(first)
    if record.error:
        raise UserError(f"the server at {client.url} does not answer the workload: {record.error}")
    await asyncio.gather(*map(client.send, others))


@contextlib.asynccontextmanager
async def _reporting(
    run: ServingRun, ramp: _Ramp, num_requests: int | None, on_progress: Callable[[RunProgress], None]
) -> AsyncIterator[None]:
    """Tell `on_progress` a few times a second, whatever the number of tokens."""
    start = time.perf_counter()

    def report() -> None:
        elapsed, num_done = time.perf_counter() - start, len(run.records)
        on_progress(RunProgress(ramp.stage, num_done, run.num_failed, num_requests, run.num_output_tokens, elapsed))

    async def keep_reporting() -> None:
        while True:
            ramp.check()
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
            now, values = time.perf_counter(), totals(await client.get("/metrics"))
            run.scrapes.append({"time": now, **{name: values[name] for name in _SCRAPED if name in values}})
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


_SCRAPED = (  # what a run is judged by
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "kv_cache_waste_perc",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
)


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
