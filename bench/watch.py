"""A server under the load of others, watched from outside: where its engine's time goes, its queue, its KV cache.

All of it is read from /metrics, which costs the server next to nothing. What a GPU does in that time is not told
there: `vcli profile MODEL` looks into it.
"""

import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.advice import FULL, LARGE, Advice
from bench.environment import environment
from bench.report import Table
from bench.result import BenchResult
from bench.scrape import by_label, totals
from engine.errors import UserError
from engine.step_clock import STAGES

PERIOD_S = 0.25
TIMEOUT_S = 10
BUSY = 0.5  # share of the time below which an engine is nobody's bottleneck
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_cache_waste_perc")
DEVICE_STAGES = ("forward", "wait")
DEFINITIONS = {
    "share": "of the wall clock of the engine's thread, all stages of which add up to it",
}


@dataclass(frozen=True)
class Scrape:
    time: float  # time.monotonic()
    values: dict[str, float]  # gauges and counters, labels summed up
    stages: dict[str, float]  # seconds


@dataclass(frozen=True)
class Watched:
    url: str
    scrapes: list[Scrape]

    @property
    def seconds(self) -> float:
        return self.scrapes[-1].time - self.scrapes[0].time

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of the engine's thread."""
        first, last = self.scrapes[0].stages, self.scrapes[-1].stages
        return {stage: last[stage] - first.get(stage, 0.0) for stage in last}

    @property
    def coverage(self) -> float:
        return sum(self.stages.values()) / self.seconds

    def share(self, *stages: str) -> float:
        total = sum(self.stages.values())
        return sum(self.stages.get(stage, 0.0) for stage in stages) / total if total else 0.0

    def gained(self, counter: str) -> float:
        return self.scrapes[-1].values.get(counter, 0.0) - self.scrapes[0].values.get(counter, 0.0)

    def seen(self, gauge: str) -> list[float]:
        return [scrape.values.get(gauge, 0.0) for scrape in self.scrapes]

    @property
    def num_steps(self) -> float:
        return self.gained("iteration_tokens_total_count")


def watch(url: str, seconds: float, on_progress: Callable[[str, float], None], api_key: str = "") -> Watched:
    """Read the metrics of a server for a while, twice at least. Raises UserError where there is none of ours."""
    scrapes = [_scrape(url, api_key)]
    if not scrapes[0].stages:
        raise UserError(f"{url} tells nothing of its engine's stages: --url watches a `vcli serve` that is ready")
    end = scrapes[0].time + seconds
    while (left := end - time.monotonic()) > 0 or len(scrapes) < 2:
        on_progress("watching", min(1.0, 1 - left / seconds))
        time.sleep(min(PERIOD_S, max(0.0, left)))
        scrapes.append(_scrape(url, api_key))
    return Watched(url, scrapes)


def _scrape(url: str, api_key: str) -> Scrape:
    request = urllib.request.Request(f"{url.rstrip('/')}/metrics")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            text = reply.read().decode()
            return Scrape(time.monotonic(), totals(text), by_label(text, "engine_stage_seconds_total", "stage"))
    except (OSError, ValueError) as error:
        raise UserError(f"no metrics come from {url} ({error}): give the address of a running `vcli serve`") from None


def describe(watched: Watched) -> str:
    tokens = watched.gained("generation_tokens_total") / watched.seconds
    prompts = watched.gained("prompt_tokens_total") / watched.seconds
    return (
        f"{watched.url} for {watched.seconds:.1f} s · {watched.num_steps:,.0f} steps · "
        f"{tokens:,.0f} tokens drawn and {prompts:,.0f} of prompts begun a second"
    )


def stage_table(watched: Watched) -> Table:
    steps = max(watched.num_steps, 1)
    rows: list[list[Any]] = [
        [stage, seconds / steps * 1e6, f"{watched.share(stage):.1%}", STAGES.get(stage, "")]
        for stage, seconds in watched.stages.items()
    ]
    total = sum(watched.stages.values()) / steps * 1e6
    rows.append(["all", total, f"{watched.coverage:.1%}", "of the wall clock"])
    text_s = watched.gained("detokenize_seconds_total")
    rows.append(["detokenize", text_s / steps * 1e6, f"{text_s / watched.seconds:.1%}", "text, in the API process"])
    return ["stage", "us a step", "share", "what it is"], rows


def batch_table(watched: Watched) -> Table:
    rows: list[list[Any]] = []
    for gauge in GAUGES:
        scale, name = (100, f"{gauge.removesuffix('_perc')}, %") if gauge.endswith("_perc") else (1, gauge)
        values = [scale * value for value in watched.seen(gauge)]
        rows.append([name, statistics.mean(values), statistics.median(values), max(values)])
    mean_tokens = watched.gained("iteration_tokens_total_sum") / max(watched.num_steps, 1)
    rows.append(["tokens in a step", mean_tokens, None, None])
    rows.append(["preemptions", watched.gained("num_preemptions_total"), None, None])
    return ["batch", "mean", "p50", "max"], rows


def advise(watched: Watched) -> list[Advice]:
    """The most promising first, as bench/advice.py does it of a profile."""
    return sorted(_findings(watched), key=lambda advice: -advice.gain)


def _findings(w: Watched) -> Iterator[Advice]:
    idle = w.share("idle")
    if idle >= BUSY:
        yield Advice(
            "not the engine",
            f"{idle:.0%} of the time no request is there",
            idle,
            "a higher load, or look at the clients",
        )
        return
    waiting, running = (statistics.mean(w.seen(f"num_requests_{state}")) for state in ("waiting", "running"))
    kv_usage, num_preemptions = max(w.seen("kv_cache_usage_perc")), w.gained("num_preemptions_total")
    more_cache = "--kv-cache-dtype fp8 on a GPU, a larger --kv-cache-memory, or a lower --max-num-seqs"
    if num_preemptions:
        seen = f"{num_preemptions:,.0f} times a request gave its blocks up, to be computed again later"
        yield Advice("a KV cache too small for the requests that run at once", seen, 0.5, more_cache)
    elif waiting >= LARGE * (waiting + running):
        seen = f"{waiting:,.0f} requests wait beside {running:,.0f} that run, the KV cache at most {kv_usage:.0%} full"
        if kv_usage >= FULL:
            yield Advice("a full KV cache, for whose blocks requests wait", seen, 0.4, more_cache)
        else:
            yield Advice(
                "the limit of requests that may run at once, although the KV cache has room",
                seen,
                0.4,
                "a higher --max-num-seqs",
            )
    busy = 1 - idle
    device = w.share(*DEVICE_STAGES) / busy
    host = {stage: seconds for stage, seconds in w.stages.items() if stage not in ("idle", *DEVICE_STAGES)}
    if 1 - device >= 2 * LARGE:
        largest = max(host, key=lambda stage: host[stage])
        seen = f"{1 - device:.0%} of the busy time is not the model's; most of it goes to `{largest}`"
        yield Advice("the host's part of a step", seen, (1 - device) / 2)
    else:
        seen = f"{device:.0%} of the busy time goes to running the model or waiting for it"
        yield Advice("the model itself", seen, 0.0, "`vcli profile MODEL`, which looks into its steps")
    text = w.gained("detokenize_seconds_total") / w.seconds
    if text >= BUSY:
        yield Advice("making text of tokens", f"it takes {text:.0%} of a core of the API process", 0.1)


def to_result(watched: Watched) -> BenchResult:
    start = watched.scrapes[0].time
    return BenchResult(
        kind="profile",
        workload={"url": watched.url},
        metrics={
            "duration": watched.seconds,
            "num_steps": int(watched.num_steps),
            "output_throughput": watched.gained("generation_tokens_total") / watched.seconds,
            "stages": watched.stages,
            "coverage": watched.coverage,
            "detokenize": watched.gained("detokenize_seconds_total"),
            "num_preemptions": int(watched.gained("num_preemptions_total")),
            "steps": {
                "time": [scrape.time - start for scrape in watched.scrapes],
                **{gauge: watched.seen(gauge) for gauge in GAUGES},
            },
            "advice": [asdict(advice) for advice in advise(watched)],
        },
        environment=environment(),
        definitions=dict(DEFINITIONS),
    )
