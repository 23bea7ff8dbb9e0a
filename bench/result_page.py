"""A result as a page, and its charts as a picture: what all kinds of results have, around the parts of their own."""

from collections.abc import Sequence
from html import escape
from typing import Any

from bench import charts, compare_page, page, run_page
from bench.page import Parts
from bench.report import Table, describe, describe_machine, describe_workload, format_figure, tables
from bench.result import BenchResult
from engine.errors import UserError


def parts_of(result: BenchResult) -> Parts:
    return compare_page.parts(result) if result.kind == "compare" else run_page.parts(result)


def to_html(result: BenchResult) -> str:
    """The page."""
    details = f"{describe_workload(result)} · {describe_machine(result)}"
    return assemble(result, result.model, details, parts_of(result), tables(result))


def assemble(
    result: BenchResult, heading: str, details: str, parts: Parts, figures: Sequence[Table], style: str = ""
) -> str:
    """The page of any result: its parts, then all figures, the command, the definitions and the machine."""
    env = result.environment
    sections = [
        f"<h1>{escape(heading)}</h1>",
        f'<p class="soft">{escape(details)} · {escape(str(env.get("date") or "")[:10])}</p>',
        *parts.alarms,
        f'<p class="lead">{escape(parts.summary)}</p>' if parts.summary else "",
        page.grid(parts.cards),
    ]
    for title, words, drawn in parts.sections:
        cards = [f'<div class="card">{chart.svg()}</div>' for chart in drawn]
        sections.append(f'<h2>{title}</h2>\n<p class="soft">{escape(words)}</p>{page.grid(cards, is_wide=True)}')
    sections.append("<h2>All figures</h2>")
    sections += [page.table(columns, [list(map(format_figure, row)) for row in rows]) for columns, rows in figures]
    machine = {name: value for name, value in env.items() if name not in ("command", "date", "vcli") and value}
    facts = {
        "workload": _in_words(result.workload),
        "machine": _in_words(machine),
        "made": f"{env.get('date')} by vcli {env.get('vcli')}",
    }
    sections += [
        "<h2>The command</h2>",
        f'<div class="card"><pre>{escape(str(env.get("command")))}</pre></div>',
        "<h2>What the figures mean, and where they come from</h2>",
        page.definitions(result.definitions | parts.facts | facts),
    ]
    return page.page(f"{heading} · {details}", sections, style)


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def to_svg(result: BenchResult) -> str:
    """All charts in one picture. Raises UserError for a result that has none."""
    drawn = [chart for _, _, some in parts_of(result).sections for chart in some]
    if not drawn:
        raise UserError("the result has no samples, and so no charts: .html and .md have its figures")
    return charts.picture(describe(result), drawn, str(result.environment.get("command") or ""))
