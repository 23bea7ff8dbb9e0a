"""A profile as one page: what it comes to, where a step's time goes, and the batches, queue and memory behind it."""

import re
from collections.abc import Sequence
from html import escape

from bench import page
from bench.charts import Bar, BarChart, Chart, Point, Series
from bench.page import Parts, Section
from bench.report import Table, format_figure
from bench.result import BenchResult
from bench.result_page import assemble

MAX_POINTS = 240  # of a curve: more could not be told apart
MAX_BARS = 12
MIN_SHARE = 0.005  # of what gets a bar
STYLE = ".findings p { margin: 0; } .findings p + p { margin-top: 10px; } .findings .try { margin: 2px 0 0 20px; }"


def to_html(result: BenchResult, title: str, tables: Sequence[tuple[str, Table]], sentences: Sequence[str]) -> str:
    """The page of a profile or of a watched server; tables and sentences are those of the terminal."""
    heading, _, details = title.partition(" · ")
    parts = Parts([_findings(sentences)], "", _cards(result), _sections(result))
    figures = [table for _, table in tables]
    return assemble(result, f"Where the time goes: {heading}", details, parts, figures, STYLE)


def _findings(sentences: Sequence[str]) -> str:
    lines = []
    for line in sentences:
        words = re.sub(r"`(.+?)`", r"<code>\1</code>", escape(line.strip()))
        lines.append(f'<p class="try">{words}</p>' if line.startswith(" ") else f"<p>{words}</p>")
    return f'<div class="card findings lead">{"".join(lines)}</div>'


def _cards(result: BenchResult) -> list[str]:
    metrics = result.metrics
    step_us = metrics.get("step_us") or metrics["duration"] / max(metrics["num_steps"], 1) * 1e6
    cards = [
        page.card("A step", f"{format_figure(step_us / 1e3)} <small>ms</small>", f"{metrics['num_steps']:,} steps")
    ]
    if parts := metrics.get("parts"):
        largest = parts[0]
        reached = largest["ceiling_share"]
        note = f"at {reached:.0%} of what binds it" if reached else "of the time"
        cards.append(page.card(f"Largest: {escape(largest['part'])}", f"{largest['share']:.0%}", note))
    rate = f"{metrics['output_throughput']:,.0f} <small>tok/s</small>"
    cards.append(page.card("Tokens drawn", rate, f"over {metrics['duration']:.1f} s"))
    cards.append(page.card("Accounted for", f"{metrics['coverage']:.1%}", "of the engine's wall clock"))
    return cards


def _sections(result: BenchResult) -> list[Section]:
    metrics = result.metrics
    total = sum(metrics["stages"].values()) or 1.0
    stages = {name: seconds / total for name, seconds in metrics["stages"].items()}
    shares: list[Chart | BarChart] = []
    if parts := metrics.get("parts"):
        notes = {
            part["part"]: f"at {part['ceiling_share']:.0%} of its ceiling" for part in parts if part["ceiling_share"]
        }
        shares.append(_share_bars("A step, by part (%)", {part["part"]: part["share"] for part in parts}, notes))
    shares.append(_share_bars("The engine's thread, by stage (%)", stages, {}))
    words = "Each bar is a share of the wall clock; together they are all of it. What takes next to nothing has no bar."
    sections = [("Where a step's time goes", words, shares)]
    if len(metrics["steps"]["time"]) > 1:
        words = "Seconds from the start: what the steps were made of, who waited, and how full the KV cache was."
        sections.append(("Over time", words, _time_charts(metrics["steps"])))
    if memory := metrics.get("memory_bytes"):
        bars = [Bar(name, num_bytes / 1e6) for name, num_bytes in memory.items()]
        sections.append(("Memory", "What the device's memory holds.", [BarChart("Memory (MB)", bars)]))
    return sections


def _share_bars(title: str, shares: dict[str, float], notes: dict[str, str]) -> BarChart:
    largest = sorted((name for name in shares if shares[name] >= MIN_SHARE), key=lambda name: -shares[name])
    return BarChart(title, [Bar(name, 100 * shares[name], note=notes.get(name, "")) for name in largest[:MAX_BARS]])


def _time_charts(steps: dict[str, list[float]]) -> list[Chart | BarChart]:
    def series(name: str, label: str, scale: float = 1.0) -> Series:
        return Series(label, _means(steps["time"], [scale * value for value in steps[name]]))

    running, waiting = ("num_requests_running", "num_requests_waiting")
    usage, waste = "kv_cache_usage_perc", "kv_cache_waste_perc"
    charts: list[Chart | BarChart] = []
    if "num_decodes" in steps:
        running, waiting, usage, waste = "num_running", "num_waiting", "kv_usage", "kv_waste"
        tokens = [series("num_decodes", "decodes"), series("num_prompt_tokens", "prompt tokens")]
        charts.append(Chart("Tokens in a step", "seconds", tokens))
    charts.append(Chart("Requests", "seconds", [series(running, "running"), series(waiting, "waiting")]))
    cache = [series(usage, "blocks owned", 100), series(waste, "of those, slots empty", 100)]
    charts.append(Chart("KV cache (%)", "seconds", cache, y_top=100))
    if steps.get("num_preemptions") and steps["num_preemptions"][-1] > steps["num_preemptions"][0]:
        first = steps["num_preemptions"][0]
        gained = [num - first for num in steps["num_preemptions"]]
        points = _means(steps["time"], gained)
        charts.append(Chart("Preemptions so far", "seconds", [Series("", points, is_stepped=True)]))
    return charts


def _means(times: Sequence[float], values: Sequence[float]) -> list[Point]:
    """The points, or the means of as many neighbours as leave MAX_POINTS."""
    size = -(-len(times) // MAX_POINTS)
    groups = [slice(i, i + size) for i in range(0, len(times), size)]
    return [(_mean(times[group]), _mean(values[group])) for group in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
