"""Charts of the samples of a run (bench.serving.ServingRun.samples), or of several runs in the same ones.

Curves are drawn from what the figures were made from: each request, each gap between tokens, the server's own gauges.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.charts import BarChart, Chart, Point, Series
from bench.report import LATENCIES, format_figure

Samples = dict[str, Any]
Curves = Sequence[tuple[str, Samples]]  # with what stands in the legend
MAX_POINTS = 240  # of a curve: more could not be told apart
NUM_BINS = 60  # of the time of a run at most
TOKENS_PER_BIN = 20  # at least, on average
WIDE_RATIO = 20.0  # a scale is logarithmic if its largest value is so many times the smallest


def distributions(curves: Curves, figures: dict[str, Any] | None = None) -> list[Chart | BarChart]:
    """Each latency's distribution; of one run alone also its usual and its late `figures`, as upright lines."""
    measured = [(name, latencies_ms(samples)) for name, samples in curves]
    drawn: list[Chart | BarChart] = []
    for label, latency in LATENCIES:
        series = [Series(name, shares_below(ms[latency]), is_stepped=True) for name, ms in measured if ms[latency]]
        keys = {p: f"{p}_{latency}_ms" for p in ("p50", "p99")}
        marks = [
            (f"{p} {format_figure(figures[k])} ms", figures[k]) for p, k in keys.items() if figures and figures.get(k)
        ]
        if series:
            title = f"{label}: percent within"
            drawn.append(Chart(title, "ms", series, marks, log_x=is_wide(series, 0), y_top=100.0))
    return drawn


def over_time(curves: Curves) -> list[Chart | BarChart]:
    """What came out, what was under way, and what the server said of itself; the window of one run alone is shaded."""
    window = curves[0][1].get("window") if len(curves) == 1 else None
    wanted: list[tuple[str, Callable[[Samples], list[Point]]]] = [
        ("Output tokens per second", tokens_over_time),
        ("Requests under way", under_way_over_time),
        ("Requests waiting on the server", lambda samples: _gauge(samples, "num_requests_waiting")),
        ("KV cache in use, %", lambda samples: _gauge(samples, "kv_cache_usage_perc", 100.0)),
    ]
    drawn: list[Chart | BarChart] = []
    for title, values in wanted:
        lines = [(name, values(samples)) for name, samples in curves]
        series = [Series(name, points, is_stepped=True) for name, points in lines if points]
        if series:
            drawn.append(Chart(title, "s", series, shade=tuple(window) if window else None))
    return drawn


def latencies_ms(samples: Samples) -> dict[str, list[float]]:
    """Every measured value of each latency of completed requests, in the window if the run has one."""
    requests, window = samples["requests"], samples.get("window") or (-np.inf, np.inf)
    values: dict[str, list[float]] = {name: [] for _, name in LATENCIES}
    gaps = iter(samples["gaps"])
    for sent, ttft, e2el, num_tokens, error in _requests(requests):
        if error:
            continue
        arrivals = itertools.accumulate(itertools.islice(gaps, num_tokens - 1), initial=sent + ttft)
        values["itl"] += [(b - a) * 1e3 for a, b in itertools.pairwise(arrivals) if window[0] <= b <= window[1]]
        if window[0] <= sent <= window[1]:
            values["ttft"].append(ttft * 1e3)
            values["e2el"].append(e2el * 1e3)
            if num_tokens > 1:
                values["tpot"].append((e2el - ttft) / (num_tokens - 1) * 1e3)
    return values


def shares_below(values: Sequence[float]) -> list[Point]:
    """A distribution as a curve: value, and percent of the values that are not above it."""
    ordered = np.sort(values)
    ranks = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_POINTS)).round().astype(int))
    points = [(float(ordered[rank]), float((rank + 1) / len(ordered) * 100)) for rank in ranks]
    return [(points[0][0], 0.0), *points]


def tokens_over_time(samples: Samples) -> list[Point]:
    """Output tokens per second of completed requests, step by step."""
    gaps, times = iter(samples["gaps"]), list[float]()
    for sent, ttft, _, num_tokens, error in _requests(samples["requests"]):
        if not error:
            times += itertools.accumulate(itertools.islice(gaps, num_tokens - 1), initial=sent + ttft)
    if not times:
        return []
    num_bins = min(max(len(times) // TOKENS_PER_BIN, 1), NUM_BINS)
    counts, edges = np.histogram(times, bins=num_bins, range=(0.0, max(times)))
    rates = (counts / np.diff(edges)).tolist()
    return [*zip(edges.tolist(), rates, strict=False), (float(edges[-1]), rates[-1])]


def under_way_over_time(samples: Samples) -> list[Point]:
    """Requests that were sent and have not ended; the peaks of at most MAX_POINTS times."""
    changes = []
    for sent, _, e2el, _, _ in _requests(samples["requests"]):
        changes += [(sent, 1), (sent + e2el, -1)] if e2el is not None else []
    changes.sort()
    counts = itertools.accumulate(change for _, change in changes)
    return peaks([(time, float(count)) for (time, _), count in zip(changes, counts, strict=True)])


def _gauge(samples: Samples, name: str, factor: float = 1.0) -> list[Point]:
    server = samples["server"]
    points = zip(server.get("time", []), server.get(name, []), strict=False)
    return peaks([(max(time, 0.0), value * factor) for time, value in points if value is not None])


def _requests(requests: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    names = ("sent", "ttft", "e2el", "num_output_tokens", "error")
    return list(zip(*(requests[name] for name in names), strict=True))


def peaks(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS: the largest of so many neighbours at the time of the first; the last point stays."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    largest = [(group[0][0], max(value for _, value in group)) for group in groups]
    return largest if size == 1 else [*largest, points[-1]]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def is_wide(series: Sequence[Series], axis: int) -> bool:
    values = [point[axis] for each in series for point in each.points]
    return bool(values) and min(values) > 0 and max(values) / min(values) >= WIDE_RATIO
