"""What the dashboard shows, measured once a second for however many look at it.

The engine's last stats are read, as /metrics does, and the timings of the requests that are open; how its blocks are is
asked only while somebody looks. What always holds: every request's TTFT is counted in one sample, that of the second
of its first token.
"""

import time
from collections import deque
from typing import Any

import msgspec

from engine.async_engine import AsyncEngine
from engine.messages import EngineStats, Inspection
from engine.outputs import RequestTimings
from vcli.server.admission import Admission
from vcli.server.dashboard.slowest import Slowest, Waterfall
from vcli.server.metrics import Metrics
from vcli.server.recent_values import WINDOW, RecentValues
from vcli.version import version


class Sample(msgspec.Struct):
    """One point of every chart."""

    time: float  # time.time()
    ttft_s: list[float] | None  # P50, P95, P99 of the last 30 s
    itl_s: list[float] | None
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    num_running: int
    num_waiting: int
    kv_usage: float  # 0 to 1
    prefix_hits: float | None  # share of the tokens that were looked up in the last 30 s
    queue_s: float  # that a request which comes now will wait, as far as can be foretold


class State(msgspec.Struct):
    """What is shown as it is now."""

    status: str  # "loading", "ready", "restarting", "draining", "dead"
    stage: str
    model: str
    facts: dict[str, Any]  # that stay as they are, once the engine is ready
    kv: dict[str, float]
    blocks: bytes  # as in Inspection
    memory: dict[str, int]
    fragmentation: float | None
    totals: dict[str, float]
    slowest: list[Waterfall]


class Sampler:
    """Owns the windows that percentiles are taken of. All of it belongs to the event loop's thread."""

    def __init__(self, engine: AsyncEngine, admission: Admission, metrics: Metrics) -> None:
        self._engine = engine
        self._admission = admission
        self._gaps = metrics.recent_gaps
        self._ttfts = RecentValues()
        self._slowest = Slowest()
        # Those under way whose first token was in an earlier sample, by their id(): they have no hash.
        self._counted: dict[int, RequestTimings] = {}
        self._past: deque[EngineStats] = deque([engine.stats], maxlen=WINDOW)
        self._last_time = time.monotonic()
        self._started = time.time()
        self._model_name = metrics.model_name
        engine.on_finish.append(self._on_finish)

    def sample(self) -> Sample:
        """The second since the last call of this."""
        stats, before, now = self._engine.stats, self._past[-1], time.monotonic()
        seconds = max(now - self._last_time, 1e-3)
        looked_up = stats.prefix_cache_queries - self._past[0].prefix_cache_queries
        found = stats.prefix_cache_hits - self._past[0].prefix_cache_hits
        self._last_time = now
        self._past.append(stats)
        started = [timings for timings in self._under_way() if timings.first_token_time]
        for timings in started:
            self._count(timings)
        self._counted = {id(timings): timings for timings in started}
        self._ttfts.tick()
        self._gaps.tick()
        return Sample(
            time=round(time.time(), 3),
            ttft_s=_rounded(self._ttfts.quantiles()),
            itl_s=_rounded(self._gaps.quantiles()),
            prompt_tokens_per_s=round(max(stats.prompt_tokens - before.prompt_tokens, 0) / seconds, 1),
            generation_tokens_per_s=round(max(stats.generation_tokens - before.generation_tokens, 0) / seconds, 1),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=_share(stats.num_blocks_used, stats.num_blocks),
            prefix_hits=_share(found, looked_up) if looked_up > 0 else None,
            queue_s=round(self._admission.queue_s(), 3),
        )

    async def inspect(self) -> None:
        """Ask the engine for its blocks and its memory, which come with the next state."""
        await self._engine.inspect()

    def state(self) -> State:
        engine, stats = self._engine, self._engine.stats
        status, stage = self._status()
        seen = engine.inspection or Inspection(b"", 1, {})
        return State(
            status=status,
            stage=stage,
            model=self._model_name,
            facts=self._facts(),
            kv={
                "num_blocks": stats.num_blocks,
                "num_blocks_used": stats.num_blocks_used,
                "waste": 1 - _share(stats.num_slots_used, stats.num_slots_allocated)
                if stats.num_slots_allocated
                else 0,
                "host_blocks": stats.num_host_blocks,
                "host_blocks_used": stats.num_host_blocks_used,
            },
            blocks=seen.blocks,
            memory=seen.memory,
            fragmentation=seen.fragmentation,
            totals=_totals(stats) | {"restarts": engine.num_restarts, "rejections": self._admission.rejections.total()},
            slowest=self._slowest.among(self._under_way()),
        )

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"version": version(), "started": round(self._started, 3)}
        if (ready := self._engine.ready) is not None:
            names = ("device", "dtype", "max_model_len", "max_num_seqs", "num_blocks", "block_size")
            facts |= {name: getattr(ready, name) for name in names}
        return facts

    def _status(self) -> tuple[str, str]:
        engine = self._engine
        stage, fraction = engine.progress
        if engine.error is not None:
            return "dead", engine.error
        if self._admission.is_draining:
            return "draining", f"{self._admission.num_open} requests are open"
        if engine.ready is None or engine.is_restarting:
            return "loading" if engine.ready is None else "restarting", f"{stage}, {fraction:.0%}"
        return "ready", ""

    def _under_way(self) -> list[RequestTimings]:
        return [state.timings for state in self._engine.open_requests]

    def _on_finish(self, timings: RequestTimings) -> None:
        if timings.first_token_time:
            self._count(timings)
        self._slowest.note(timings)

    def _count(self, timings: RequestTimings) -> None:
        if id(timings) not in self._counted:
            self._ttfts.add(timings.first_token_time - timings.arrival_time)


def _totals(stats: EngineStats) -> dict[str, float]:
    names = ("num_preemptions", "prompt_tokens", "generation_tokens")
    return {name: getattr(stats, name) for name in names}


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _rounded(seconds: list[float] | None) -> list[float] | None:
    return seconds and [float(f"{value:.3g}") for value in seconds]
