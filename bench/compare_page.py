"""What is on the page of a comparison: engines side by side, each figure with its interval and its ratio."""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

from bench import page
from bench.charts import Bar, BarChart
from bench.page import Parts, Section
from bench.report import format_figure
from bench.result import BenchResult
from bench.sample_charts import distributions, over_time

FIGURES = (
    ("output_throughput", "Output tokens per second, more is better"),
    ("p50_ttft_ms", "TTFT p50, ms, less is better"),
    ("p99_ttft_ms", "TTFT p99, ms, less is better"),
    ("p50_tpot_ms", "TPOT p50, ms, less is better"),
    ("p50_itl_ms", "ITL p50, ms, less is better"),
    ("p99_itl_ms", "ITL p99, ms, less is better"),
)
MIN_CONFIDENCE = 0.9
STATUS = {"missing": "not installed", "failed": "failed"}
Engine = dict[str, Any]


def parts(result: BenchResult) -> Parts:
    engines = result.engines or []
    return Parts(_alarms(result), _summary(result), _cards(result), _sections(result), _commands(engines))


def _alarms(result: BenchResult) -> list[str]:
    alarms = []
    if reasons := result.metrics.get("invalid_reasons"):
        alarms.append(page.alarm("Not a valid comparison", reasons))
    for engine in result.engines or []:
        if engine["status"] == "failed":
            alarms.append(page.alarm(f"{engine['name']} was not measured", [engine["reason"]]))
        if engine["status"] == "missing":
            alarms.append(f'<p class="soft">Not measured: {escape(engine["reason"])}</p>')
        if num_failed := sum(figures.get("failed", 0) for figures in engine["rounds"]):
            errors = sum((Counter(figures.get("errors", {})) for figures in engine["rounds"]), Counter[str]())
            lines = [f"{count} x {error}" for error, count in errors.items()]
            alarms.append(page.alarm(f"{num_failed:,} requests to {engine['name']} failed", lines))
    return alarms


def _others(result: BenchResult) -> list[tuple[str, float, tuple[float | None, float | None]]]:
    """Name, and how many times its output throughput the reference gives, with the interval of that."""
    found = []
    for engine in result.engines or []:
        figure = engine["figures"].get("output_throughput")
        if figure and figure.get("ratio") and engine["name"] != result.metrics["reference"]:
            low, high = (1 / edge if edge else None for edge in figure["ratio_interval"])
            found.append((engine["name"], 1 / figure["ratio"], (high, low)))
    return found


def _summary(result: BenchResult) -> str:
    reference = result.metrics["reference"]
    told, even = [], []
    for name, ratio, (low, high) in _others(result):
        if low is None or high is None or low <= 1 <= high:
            even.append(name)
        else:
            told.append(f"{ratio:.2f} times as many as {name}")
    sentences = [f"Of tokens a second, {reference} gives {' and '.join(told)}."] if told else []
    sentences += [f"Between {reference} and {name} no difference could be told." for name in even]
    if sentences and result.metrics.get("confidence", 1.0) < MIN_CONFIDENCE:
        num_rounds = result.metrics["num_rounds"]
        rounds = "One round is" if num_rounds == 1 else f"{num_rounds} rounds are"
        sentences.append(f"{rounds} too few to be sure of that.")
    return " ".join(sentences)


def _cards(result: BenchResult) -> list[str]:
    reference, confidence = result.metrics["reference"], result.metrics.get("confidence")
    cards = []
    for engine in result.engines or []:
        if engine["name"] == reference and engine["figures"]:
            value = f"{format_figure(engine['figures']['output_throughput']['median'])} <small>tok/s</small>"
            cards.append(page.card(escape(reference), value, f"median of {len(engine['rounds'])} rounds"))
    for name, ratio, (low, high) in _others(result):
        if low is None or high is None:
            note = "too few rounds for an interval"
        else:
            is_sure = confidence is None or confidence >= MIN_CONFIDENCE
            kind = "" if not is_sure else "good" if low > 1 else "bad" if high < 1 else ""
            sure = f", {confidence:.0%} sure" if confidence else ""
            note = f'<span class="{kind}">{low:.2f} to {high:.2f}</span>{sure}'
        cards.append(page.card(f"Throughput against {escape(name)}", f"{ratio:.2f} <small>times</small>", note))
    return cards


def _sections(result: BenchResult) -> list[Section]:
    engines = result.engines or []
    reference, sure = result.metrics["reference"], result.metrics.get("confidence")
    lines = f"; the lines are {sure:.0%} intervals" if sure else ""
    words = f"Medians over rounds in changing order{lines}; x is times {reference}, round by round."
    bars = [_bars(title, engines, partial(_bar, key)) for key, title in FIGURES]
    bars += [
        _bars("Start-up, s, less is better", engines, _start_bar),
        _bars("Memory, MB, less is better", engines, _memory_bar),
    ]
    sections: list[Section] = [("Side by side", words, [chart for chart in bars if chart.bars])]
    if curves := [(engine["name"], engine["samples"]) for engine in engines if engine.get("samples")]:
        words = "Of each engine's median round: how many percent of the requests (of the gaps between tokens, for ITL) "
        sections.append(("Latency", words + "took so long or less.", distributions(curves)))
        sections.append(("Over time", "Of the same rounds, in seconds from their start.", over_time(curves)))
    return sections


def _bars(title: str, engines: list[Engine], make: Callable[[Engine], Bar | None]) -> BarChart:
    """A colour stands for the same engine in every chart."""
    bars = [(i, bar) for i, bar in enumerate(map(make, engines)) if bar]
    return BarChart(title, [bar for _, bar in bars], [i for i, _ in bars])


def _bar(key: str, engine: Engine) -> Bar | None:
    """With the first figure an engine that has none says why."""
    figure = engine["figures"].get(key)
    if figure is None or figure["median"] is None:
        is_first = key == FIGURES[0][0]
        return Bar(engine["name"], None, note=STATUS.get(engine["status"], "")) if is_first else None
    low, high = figure["interval"]
    note = f"{figure['ratio']:.2f}x" if figure.get("ratio") else ""
    return Bar(engine["name"], figure["median"], low, high, note)


def _start_bar(engine: Engine) -> Bar | None:
    seconds = engine["start_s"]
    if not seconds:
        return None
    ends = (min(seconds), max(seconds)) if len(seconds) > 1 else (None, None)
    return Bar(engine["name"], statistics.median(seconds), *ends)


def _memory_bar(engine: Engine) -> Bar | None:
    return Bar(engine["name"], engine["memory_bytes"] / 1e6) if engine["memory_bytes"] else None


def _commands(engines: list[Engine]) -> dict[str, str]:
    words = {engine["name"]: [engine["command"], engine.get("note")] for engine in engines}
    return {f"command of {name}": "; ".join(filter(None, each)) for name, each in words.items() if any(each)}
