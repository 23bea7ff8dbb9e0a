"""What is counted, as Prometheus reads it: `vcli:` and the stems that vLLM uses, so that dashboards move by a rename.

The state of the engine is read from its last stats when somebody asks; what a request was like is noted as its tokens
pass and at its end. One process, one registry. Names never change once published.
"""

import time
from collections.abc import Iterator, Sequence

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.async_engine import AsyncEngine
from engine.messages import EngineStats
from engine.outputs import OutputDelta, RequestTimings
from vcli.server.admission import Admission
from vcli.server.recent_values import RecentValues

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST

# Seconds, from 0.5 ms: a step on a GPU takes a few milliseconds, a long answer on a CPU minutes.
_MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 60_000, 120_000, 300_000)
BUCKETS_S = (0.0005, *(milliseconds / 1000 for milliseconds in _MARKS))
BUCKETS_TOKENS = tuple(2**power for power in range(15))


class Metrics:
    """Owns the registry of one server."""

    def __init__(self, model_name: str, engine: AsyncEngine, admission: Admission) -> None:
        self.model_name = model_name
        self.recent_gaps = RecentValues()  # between tokens, finer than in the histogram
        self.registry = prometheus.CollectorRegistry()
        self.registry.register(_StateCollector(model_name, engine, admission))
        prometheus.ProcessCollector(registry=self.registry)

        def histogram(name: str, what: str, buckets: Sequence[float] = BUCKETS_S) -> prometheus.Histogram:
            family = prometheus.Histogram(f"vcli:{name}", what, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        self._ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._itl = histogram("inter_token_latency_seconds", "Gaps between tokens; k tokens at once count as k gaps.")
        self._tpot = histogram("request_time_per_output_token_seconds", "A request's mean gap between tokens.")
        self._e2el = histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.")
        self._queue = histogram("request_queue_time_seconds", "From a request's arrival to its first step.")
        self._prefill = histogram("request_prefill_time_seconds", "From a request's first step to its first token.")
        self._decode = histogram("request_decode_time_seconds", "From a request's first token to its last.")
        self._step_tokens = histogram("iteration_tokens_total", "Tokens in a step.", BUCKETS_TOKENS)
        success = prometheus.Counter(
            "vcli:request_success",
            "Sequences that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._success = {reason: success.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}

    def render(self) -> bytes:
        return prometheus.generate_latest(self.registry)

    def meter(self) -> "Meter":
        return Meter(self._itl, self.recent_gaps)

    def on_step(self, stats: EngineStats) -> None:
        """Note the size of a step."""
        self._step_tokens.observe(stats.batch_tokens)

    def on_finish(self, timings: RequestTimings) -> None:
        """Note how a request went, at its end."""
        for reason in timings.finish_reasons:
            self._success[reason].inc()
        if not timings.last_token_time:
            return
        self._e2el.observe(timings.last_token_time - timings.arrival_time)
        self._queue.observe(timings.scheduled_time - timings.arrival_time)
        self._prefill.observe((timings.first_token_time or timings.last_token_time) - timings.scheduled_time)
        if not timings.first_token_time:
            return  # an embedding
        decode_s = timings.last_token_time - timings.first_token_time
        num_later_tokens = timings.num_output_tokens - len(timings.finish_reasons)  # after the first of each sequence
        self._ttft.observe(timings.first_token_time - timings.arrival_time)
        self._decode.observe(decode_s)
        if num_later_tokens > 0:
            self._tpot.observe(decode_s * len(timings.finish_reasons) / num_later_tokens)


class Meter:
    """Watches the tokens of one call go by, for the gaps between them."""

    def __init__(self, gaps: prometheus.Histogram, recent: RecentValues) -> None:
        self._gaps = gaps
        self._recent = recent
        self._last_seen: dict[tuple[int, int], float] = {}

    def on_deltas(self, prompt_index: int, deltas: list[OutputDelta]) -> None:
        now = time.monotonic()
        for delta in deltas:
            num_tokens = len(delta.token_ids)
            if not num_tokens:
                continue
            key = (prompt_index, delta.index)
            if key in self._last_seen:
                gap = (now - self._last_seen[key]) / num_tokens
                for _ in range(num_tokens):
                    self._gaps.observe(gap)
                self._recent.add(gap, num_tokens)
            self._last_seen[key] = now


class _StateCollector(Collector):
    """Gauges and counters that others keep, read when Prometheus asks."""

    def __init__(self, model_name: str, engine: AsyncEngine, admission: Admission) -> None:
        self._model_name = model_name
        self._engine = engine
        self._admission = admission

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._engine.stats
        waste = 1 - stats.num_slots_used / stats.num_slots_allocated if stats.num_slots_allocated else 0.0
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Sequences in the running batch.", stats.num_running)
        num_waiting = self._engine.num_unfinished if self._engine.is_restarting else stats.num_waiting
        yield self._gauge("num_requests_waiting", "Sequences that wait for a place in it.", num_waiting)
        queue_s, utilization = self._admission.queue_s(), self._admission.utilization()
        yield self._gauge("predicted_queue_seconds", "How long a request that came now would wait.", queue_s)
        yield self._gauge("utilization_perc", "Open sequences by those that can run at once; 1 is full.", utilization)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks that requests own, 0 to 1.", usage)
        yield self._gauge("kv_cache_waste_perc", "Share of the token slots in those that hold no token.", waste)
        yield self._counter("prompt_tokens", "Prompt tokens of the requests that gave a token.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_cache_hits)
        yield self._counter("num_preemptions", "Sequences that gave their blocks up for others.", stats.num_preemptions)
        usage = stats.num_host_blocks_used / stats.num_host_blocks if stats.num_host_blocks else 0.0
        yield self._gauge("host_kv_cache_usage_perc", "Share of the host's KV blocks that hold something.", usage)
        yield self._counter("kv_blocks_paged_out", "KV blocks copied to the host.", stats.num_blocks_paged_out)
        yield self._counter("kv_blocks_paged_in", "KV blocks copied back from the host.", stats.num_blocks_paged_in)
        yield self._counter("engine_restarts", "Engines started after the first one.", self._engine.num_restarts)
        quarantined = self._engine.num_quarantined
        yield self._counter("quarantined_requests", "Requests that ended the engine, run alone.", quarantined)
        rejections = CounterMetricFamily(
            "vcli:admission_rejections", "Requests turned away at the door.", labels=["model_name", "reason"]
        )
        for reason, count in self._admission.rejections.items():
            rejections.add_metric([self._model_name, reason], count)
        yield rejections
        yield self._stages(stats)
        yield from self._gpu_memory()
        seconds = self._engine.detokenize_s
        yield self._counter("detokenize_seconds", "The API process making text of tokens, beside the engine.", seconds)

    def _stages(self, stats: EngineStats) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "vcli:engine_stage_seconds",
            "Where the engine's thread spends its time; all stages add up to the wall clock.",
            labels=["model_name", "stage"],
        )
        # An engine with nothing to do sends nothing.
        idle_s = 0.0 if stats.num_running or stats.num_waiting or not stats.time else time.monotonic() - stats.time
        for stage, seconds in stats.stage_seconds.items():
            family.add_metric([self._model_name, stage], seconds + (max(idle_s, 0.0) if stage == "idle" else 0.0))
        return family

    def _gpu_memory(self) -> Iterator[GaugeMetricFamily]:
        """Of the last inspection; a server on a CPU has none."""
        inspection = self._engine.inspection
        if inspection is None or inspection.fragmentation is None:
            return
        what = "Memory of the GPU: what holds it, and what is free; all kinds add up to the whole."
        family = GaugeMetricFamily("vcli:gpu_memory_bytes", what, labels=["model_name", "kind"])
        for kind, num_bytes in inspection.memory.items():
            family.add_metric([self._model_name, kind], num_bytes)
        yield family
        what = "Share of the memory that torch holds which lies unused between tensors, 0 to 1."
        yield self._gauge("gpu_memory_fragmentation_perc", what, inspection.fragmentation)

    def _gauge(self, name: str, what: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vcli:{name}", what, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"vcli:{name}", what, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
