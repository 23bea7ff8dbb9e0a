"""A result as a page, and its charts as a picture: what all kinds of results have, around the parts of their own."""

from html import escape

from bench import charts, compare_page, page, run_page
from bench.page import Parts
from bench.report import describe, describe_machine, describe_workload, format_figure, tables
from bench.result import BenchResult
from engine.errors import UserError


def parts_of(result: BenchResult) -> Parts:
    return compare_page.parts(result) if result.kind == "compare" else run_page.parts(result)


def to_html(result: BenchResult) -> str:
    """The page."""
    parts = parts_of(result)
    env = result.environment
    revision = (env.get("git_revision") or "unknown")[:9] + ("+" if env.get("git_dirty") else "")
    sections = [
        f"<h1>{escape(result.model)}</h1>",
        f'<p class="soft">{escape(describe_workload(result))} · {escape(describe_machine(result))} · '
        f"{escape(str(env.get('date') or '')[:10])}</p>",
        *parts.alarms,
        f'<p class="lead">{escape(parts.summary)}</p>',
        page.grid(parts.cards),
    ]
    for title, words, drawn in parts.sections:
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
        page.definitions(result.definitions | parts.facts | facts),
    ]
    return page.page(describe(result), sections)


def to_svg(result: BenchResult) -> str:
    """All charts in one picture. Raises UserError for a result that has none."""
    drawn = [chart for _, _, some in parts_of(result).sections for chart in some]
    if not drawn:
        raise UserError("the result has no samples, and so no charts: .html and .md have its figures")
    return charts.picture(describe(result), drawn, str(result.environment.get("command") or ""))
