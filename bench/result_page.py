"""A result of `vcli bench` as a page, and its charts as a picture.

Curves are drawn from the samples of a result: each request, each gap between tokens, the server's own gauges.
"""

import itertools
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from bench import charts, page
from bench.charts import Bar, BarChart, Chart, Point, Series
from bench.report import LATENCIES, describe, describe_machine, describe_workload, format_figure, tables
from bench.result import BenchResult
from engine.errors import UserError

MAX_POINTS = 240  # of a curve: more could not be told apart
MAX_CURVES = 6  # of a sweep in one chart
NUM_BINS = 60  # of the time of a run at most
TOKENS_PER_BIN = 20  # at least, on average
WIDE_RATIO = 20.0  # a scale is logarithmic if its largest value is so many times the smallest


def to_html(result: BenchResult) -> str:
    """The page."""
    env = result.environment
    revision = (env.get("git_revision") or "unknown")[:9] + ("+" if env.get("git_dirty") else "")
    sections = [
        f"<h1>{escape(result.model)}</h1>",
        f'<p class="soft">{escape(describe_workload(result))} · {escape(describe_machine(result))} · '
        f"{escape(str(env.get('date') or '')[:10])}</p>",
        *_alarms(result),
        f'<p class="lead">{escape(summary(result))}</p>',
        page.grid(_cards(result)),
    ]
    for title, words, drawn in chart_sections(result):
        figures = [f'<div class="card">{chart.svg()}</div>' for chart in drawn]
        sections.append(f'<h2>{title}</h2>\n<p class="soft">{escape(words)}</p>{page.grid(figures, is_wide=True)}')
    sections.append("<h2>All figures</h2>")
    sections += [
        page.table(columns, [[format_figure(v) for v in row] for row in rows]) for columns, rows in tables(result)
    ]
    facts = {
        "workload": ", ".join(f"{name} {value}" for name, value in result.workload.items()),
        "machine": ", ".join(
            f"{name} {value}" for name, value in env.items() if name not in ("command", "date") and value
        ),
        "made": f"{env.get('date')} by vcli {env.get('vcli')}, revision {revision}",
    }
    sections += [
        "<h2>The command</h2>",
        f'<div class="card"><pre>{escape(str(env.get("command")))}</pre></div>',
        "<h2>What the figures mean, and where they come from</h2>",
        page.definitions(result.definitions | facts),
    ]
    return page.page(describe(result), sections)


def summary(result: BenchResult) -> str:
    """What there is to know, in a sentence or two."""
    runs = [run for run in result.runs or [result] if run.is_valid and run.metrics.get("p50_ttft_ms") is not None]
    if not runs:
        return ""
    first, last = runs[0].metrics, runs[-1].metrics
    if len(runs) > 1:
        throughput, ttft = (last[name] / first[name] for name in ("output_throughput", "p50_ttft_ms"))
        return (
            f"From {_amount(runs[0])} to {_load(runs[-1])}, throughput becomes {throughput:.2g} times as much, and a "
            f"request usually waits {ttft:.2g} times as long for its first token."
        )
    then = f" Then a token follows every {format_figure(tpot)} ms." if (tpot := first.get("p50_tpot_ms")) else ""
    return f"Half of the requests get their first token within {format_figure(first['p50_ttft_ms'])} ms.{then}"


def to_svg(result: BenchResult) -> str:
    """All charts in one picture. Raises UserError for a result that has none."""
    drawn = [chart for _, _, some in chart_sections(result) for chart in some]
    if not drawn:
        raise UserError("the result has no samples, and so no charts: .html and .md have its figures")
    return charts.picture(describe(result), drawn, str(result.environment.get("command") or ""))


def chart_sections(result: BenchResult) -> list[tuple[str, str, list[Chart | BarChart]]]:
    """Title, explanation and charts of each part of the page."""
    sections: list[tuple[str, str, list[Chart | BarChart]]] = []
    if "rows" in result.metrics:
        sections.append(("By batch size", "Tokens a second of one prefill and of decode steps.", _batch_charts(result)))
    elif result.kind == "throughput":
        sections.append(("Throughput", "All prompts at once, in one process.", [_throughput_bars(result)]))
    if result.runs:
        words = "Each dot is a run at one load, which stands beside it. Down and to the right is better."
        sections.append(("Throughput against latency", words, _sweep_charts(result)))
    sampled = [run for run in result.runs or [result] if run.samples]
    if not sampled:
        return sections
    curves = _spread(sampled, MAX_CURVES)
    left_out = f" {len(curves)} of {len(sampled)} runs are drawn." if len(curves) < len(sampled) else ""
    words = "How many percent of the requests (of the gaps between tokens, for ITL) took so long or less."
    sections.append(("Latency", words + left_out, _distributions(curves)))
    words = "Seconds from the start of a run: what came out, and what the server says of itself."
    if any(run.samples and run.samples.get("window") for run in curves):
        words += " The figures are of the shaded time."
    sections.append(("Over time", words + left_out, _time_charts(curves)))
    return sections


def _alarms(result: BenchResult) -> list[str]:
    alarms = []
    for run in result.runs or [result]:
        where = f" ({_load(run)})" if result.runs else ""
        if reasons := run.metrics.get("invalid_reasons"):
            title = "Not a valid result: the figures say nothing about the server"
            alarms.append(page.alarm(title + where, reasons))
        if num_failed := run.metrics.get("failed"):
            total = num_failed + run.metrics["completed"]
            lines = [f"{count} x {error}" for error, count in run.metrics.get("errors", {}).items()]
            alarms.append(page.alarm(f"{num_failed:,} of {total:,} requests failed{where}", lines))
    return alarms


def _cards(result: BenchResult) -> list[str]:
    """The figures to be seen first."""
    if result.runs:
        return _sweep_cards(result)
    figures = result.metrics
    if "rows" in figures:
        best: dict[str, dict[str, Any]] = {}
        for row in figures["rows"]:
            best[row["test"]] = max(best.get(row["test"], row), row, key=lambda row: row["tokens_per_s"])
        return [
            page.card(
                test, f"{format_figure(row['tokens_per_s'])} <small>tok/s</small>", f"at batch {row['batch_size']}"
            )
            for test, row in best.items()
        ]
    cards = [_throughput_card(result)]
    for label, name in LATENCIES[:3]:
        if (usual := figures.get(f"p50_{name}_ms")) is not None:
            note = f"p50; p99 {format_figure(figures[f'p99_{name}_ms'])} ms"
            cards.append(page.card(label, f"{format_figure(usual)} <small>ms</small>", note))
    if "request_goodput" in figures:
        wanted = ", ".join(f"{name} {seconds * 1e3:g} ms" for name, seconds in result.workload.get("slo", {}).items())
        share = figures["request_goodput"] / figures["request_throughput"] if figures["request_throughput"] else 0.0
        value = f"{format_figure(figures['request_goodput'])} <small>req/s</small>"
        cards.append(page.card("Goodput", value, f"{share:.0%} of the requests within {escape(wanted)}"))
    if "completed" in figures:
        failed = figures.get("failed", 0)
        note = f'<span class="bad">{failed:,} failed</span>' if failed else "none failed"
        cards.append(page.card("Requests", f"{figures['completed']:,} <small>completed</small>", note))
    if (usage := figures.get("peak_kv_usage_perc")) is not None and len(cards) < 6:
        cards.append(page.card("KV cache", f"{format_figure(usage)} <small>%</small>", "in use at its peak"))
    return cards


def _throughput_card(result: BenchResult) -> str:
    figures, notes = result.metrics, []
    if result.baseline:
        notes.append(f"{result.baseline['ratio']:.2f} times {escape(result.baseline['engine'])} generate")
    if result.floor:
        notes.append(f"{result.floor['run_s'] / figures['duration']:.0%} of what the hardware can do")
    if not notes and "request_throughput" in figures:
        notes.append(f"{format_figure(figures['request_throughput'])} requests a second")
    value = f"{format_figure(figures['output_throughput'])} <small>tok/s</small>"
    return page.card("Output throughput", value, "; ".join(notes))


def _sweep_cards(result: BenchResult) -> list[str]:
    cards = []
    wanted: list[tuple[str, str, str, Callable[..., Any]]] = [
        ("Highest throughput", "output_throughput", "tok/s", max),
        *(
            ("Highest goodput", "request_goodput", "req/s", max)
            for run in result.runs[:1]
            if "request_goodput" in run.metrics
        ),
        ("Lowest TTFT, p50", "p50_ttft_ms", "ms", min),
        ("Lowest TPOT, p50", "p50_tpot_ms", "ms", min),
    ]
    for label, name, unit, best in wanted:
        runs = [run for run in result.runs if run.metrics.get(name) is not None and run.is_valid]
        if runs:
            run = best(runs, key=lambda run: run.metrics[name])
            cards.append(
                page.card(label, f"{format_figure(run.metrics[name])} <small>{unit}</small>", f"at {_load(run)}")
            )
    return cards


def _sweep_charts(result: BenchResult) -> list[Chart | BarChart]:
    """Latencies over throughput, a dot for each load."""
    drawn: list[Chart | BarChart] = []
    for label, name in LATENCIES[:3]:
        series = []
        for percentile in (50, 99):
            key = f"p{percentile}_{name}_ms"
            runs = [run for run in result.runs if run.metrics.get(key) is not None]
            points = [(run.metrics["output_throughput"], run.metrics[key]) for run in runs]
            series.append(Series(f"p{percentile}", points, [_amount(run) if percentile == 99 else "" for run in runs]))
        drawn.append(Chart(f"{label}, ms", "output tokens per second", series, log_y=_is_wide(series, 1)))
    of = "concurrent requests" if "concurrency" in result.runs[0].workload else "requests per second asked for"
    series = [
        Series(words, [(_number(run), run.metrics[key]) for run in result.runs], [""] * len(result.runs))
        for words, key in (("output tok/s", "output_throughput"), ("prompt and output tok/s", "total_token_throughput"))
        if all(np.isfinite(_number(run)) for run in result.runs)
    ]
    if series:
        drawn.append(Chart("Tokens per second", of, series, log_x=_is_wide(series, 0)))
    return drawn


def _distributions(runs: Sequence[BenchResult]) -> list[Chart | BarChart]:
    drawn: list[Chart | BarChart] = []
    for label, name in LATENCIES:
        measured = [(run, latencies_ms(run)[name]) for run in runs]
        series = [
            Series(_load(run) if len(runs) > 1 else "", shares_below(ms), is_stepped=True) for run, ms in measured if ms
        ]
        if not series:
            continue
        marks = []
        if len(runs) == 1:
            figures = runs[0].metrics
            marks = [
                (f"{p} {format_figure(figures[key])} ms", figures[key])
                for p in ("p50", "p99")
                if figures.get(key := f"{p}_{name}_ms")
            ]
        drawn.append(Chart(f"{label}: percent within", "ms", series, marks, log_x=_is_wide(series, 0), y_top=100.0))
    return drawn


def _time_charts(runs: Sequence[BenchResult]) -> list[Chart | BarChart]:
    names = [_load(run) if len(runs) > 1 else "" for run in runs]
    shade = runs[0].samples["window"] if len(runs) == 1 and runs[0].samples else None
    wanted: list[tuple[str, Callable[[dict[str, Any]], list[Point]], float | None]] = [
        ("Output tokens per second", tokens_over_time, None),
        ("Requests under way", under_way_over_time, None),
        ("Requests waiting on the server", lambda samples: _gauge(samples, "num_requests_waiting"), None),
        ("KV cache in use, %", lambda samples: _gauge(samples, "kv_cache_usage_perc", 100.0), None),
    ]
    drawn: list[Chart | BarChart] = []
    for title, values, top in wanted:
        series = [
            Series(name, points, is_stepped=True)
            for name, run in zip(names, runs, strict=True)
            if run.samples and (points := values(run.samples))
        ]
        if series:
            drawn.append(Chart(title, "s", series, shade=tuple(shade) if shade else None, y_top=top))
    return drawn


def _batch_charts(result: BenchResult) -> list[Chart | BarChart]:
    drawn: list[Chart | BarChart] = []
    for test in dict.fromkeys(row["test"] for row in result.metrics["rows"]):
        rows = [row for row in result.metrics["rows"] if row["test"] == test]
        points = [(row["batch_size"], row["tokens_per_s"]) for row in rows]
        series = [Series("", points, [charts.shorten(row["tokens_per_s"]) for row in rows])]
        drawn.append(Chart(f"{test}: tokens per second", "batch size", series, log_x=_is_wide(series, 0)))
    return drawn


def _throughput_bars(result: BenchResult) -> BarChart:
    names = {
        "output_throughput": "output",
        "decode_throughput": "decode steps alone",
        "prefill_throughput": "prefill alone",
    }
    bars = [Bar(words, result.metrics[key]) for key, words in names.items() if result.metrics.get(key) is not None]
    if result.baseline:
        bars.append(Bar(f"output of {result.baseline['engine']} generate", result.baseline["output_throughput"]))
    return BarChart("Tokens per second", bars)


def latencies_ms(run: BenchResult) -> dict[str, list[float]]:
    """Every measured value of each latency of completed requests, in the window if the run has one."""
    assert run.samples
    requests, window = run.samples["requests"], run.samples["window"] or (-np.inf, np.inf)
    values: dict[str, list[float]] = {name: [] for _, name in LATENCIES}
    gaps = iter(run.samples["gaps"])
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


def tokens_over_time(samples: dict[str, Any]) -> list[Point]:
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


def under_way_over_time(samples: dict[str, Any]) -> list[Point]:
    """Requests that were sent and have not ended; at most MAX_POINTS of the changes."""
    changes = []
    for sent, _, e2el, _, _ in _requests(samples["requests"]):
        changes += [(sent, 1), (sent + e2el, -1)] if e2el is not None else []
    changes.sort()
    counts = itertools.accumulate(change for _, change in changes)
    return _spread([(time, float(count)) for (time, _), count in zip(changes, counts, strict=True)], MAX_POINTS)


def _gauge(samples: dict[str, Any], name: str, factor: float = 1.0) -> list[Point]:
    server = samples["server"]
    points = zip(server.get("time", []), server.get(name, []), strict=False)
    return _spread([(max(time, 0.0), value * factor) for time, value in points if value is not None], MAX_POINTS)


def _requests(requests: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    names = ("sent", "ttft", "e2el", "num_output_tokens", "error")
    return list(zip(*(requests[name] for name in names), strict=True))


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _is_wide(series: Sequence[Series], axis: int) -> bool:
    values = [point[axis] for each in series for point in each.points]
    return bool(values) and min(values) > 0 and max(values) / min(values) >= WIDE_RATIO


def _load(run: BenchResult) -> str:
    return f"{_amount(run)} {'concurrent' if 'concurrency' in run.workload else 'req/s'}"


def _amount(run: BenchResult) -> str:
    workload = run.workload
    return str(workload["concurrency"]) if "concurrency" in workload else f"{float(workload['request_rate']):g}"


def _number(run: BenchResult) -> float:
    return float(_amount(run))
