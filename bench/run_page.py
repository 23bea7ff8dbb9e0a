"""What is on the page of a run, of a sweep, and of what was measured without a server."""

import math
from collections.abc import Callable
from html import escape
from typing import Any

from bench import charts, page
from bench.charts import Bar, BarChart, Chart, Series
from bench.page import Parts, Section
from bench.report import LATENCIES, format_figure
from bench.result import BenchResult
from bench.sample_charts import distributions, is_wide, over_time, spread

MAX_CURVES = 6  # of a sweep in one chart


def parts(result: BenchResult) -> Parts:
    return Parts(_alarms(result), _summary(result), _cards(result), _sections(result))


def _summary(result: BenchResult) -> str:
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


def _sections(result: BenchResult) -> list[Section]:
    """Title, explanation and charts of each part of the page."""
    sections: list[Section] = []
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
    drawn = spread(sampled, MAX_CURVES)
    curves = [(_load(run) if len(drawn) > 1 else "", run.samples or {}) for run in drawn]
    left_out = f" {len(drawn)} of {len(sampled)} runs are drawn." if len(drawn) < len(sampled) else ""
    words = "How many percent of the requests (of the gaps between tokens, for ITL) took so long or less."
    figures = drawn[0].metrics if len(drawn) == 1 else None
    sections.append(("Latency", words + left_out, distributions(curves, figures)))
    words = "Seconds from the start of a run: what came out, and what the server says of itself."
    if len(drawn) == 1 and drawn[0].samples and drawn[0].samples.get("window"):
        words += " The figures are of the shaded time."
    sections.append(("Over time", words + left_out, over_time(curves)))
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
                escape(test),
                f"{format_figure(row['tokens_per_s'])} <small>tok/s</small>",
                f"at batch {row['batch_size']:,}",
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
                page.card(
                    label, f"{format_figure(run.metrics[name])} <small>{unit}</small>", escape(f"at {_load(run)}")
                )
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
        drawn.append(Chart(f"{label}, ms", "output tokens per second", series, log_y=is_wide(series, 1)))
    of = "concurrent requests" if "concurrency" in result.runs[0].workload else "requests per second asked for"
    rates = {
        "Tokens per second": {"output": "output_throughput", "prompts and output": "total_token_throughput"},
        "Requests per second": {"completed": "request_throughput", "within the objectives": "request_goodput"},
    }
    for title, keys in rates.items():
        series = [
            Series(words, [(_number(run), run.metrics[key]) for run in runs], [""] * len(runs))
            for words, key in keys.items()
            if (runs := [run for run in result.runs if key in run.metrics and math.isfinite(_number(run))])
        ]
        if len(series) == len(keys):
            drawn.append(Chart(title, of, series, log_x=is_wide(series, 0)))
    return drawn


def _batch_charts(result: BenchResult) -> list[Chart | BarChart]:
    drawn: list[Chart | BarChart] = []
    for test in dict.fromkeys(row["test"] for row in result.metrics["rows"]):
        rows = [row for row in result.metrics["rows"] if row["test"] == test]
        points = [(row["batch_size"], row["tokens_per_s"]) for row in rows]
        series = [Series("", points, [charts.shorten(row["tokens_per_s"]) for row in rows])]
        drawn.append(Chart(f"{test}: tokens per second", "batch size", series, log_x=is_wide(series, 0)))
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


def _load(run: BenchResult) -> str:
    return f"{_amount(run)} {'concurrent' if 'concurrency' in run.workload else 'req/s'}"


def _amount(run: BenchResult) -> str:
    workload = run.workload
    return str(workload["concurrency"]) if "concurrency" in workload else f"{float(workload['request_rate']):g}"


def _number(run: BenchResult) -> float:
    return float(_amount(run))
