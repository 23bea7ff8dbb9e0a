"""A report as one page that needs nothing beside it: no script, no font, no network.

What all reports have in common is here: colours that follow the reader's light or dark setting, cards, tables,
definitions. Charts are SVG (bench/charts.py), or HTML where the words are the chart.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from bench.charts import COLORS, BarChart, Chart
from bench.charts import STYLE as CHART_STYLE

_LIGHT, _DARK = ("; ".join(f"--{name}: {pair[i]}" for name, pair in COLORS.items()) for i in (0, 1))
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT}; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK}; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }}
h2 {{ font-size: 1.15rem; margin: 36px 0 4px; }}
h3 {{ font-size: .95rem; margin: 0; }}
p {{ margin: 0 0 12px; max-width: 75ch; }}
pre {{ margin: 0; white-space: pre-wrap; font-size: .875rem; }}
.soft, dl {{ color: var(--soft); font-size: .875rem; }}
.lead {{ font-size: 1.1rem; margin: 16px 0 20px; }}
.grid {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(max(160px, 30%), 1fr)); }}
.four {{ grid-template-columns: repeat(auto-fill, minmax(max(160px, 23%), 1fr)); }}
.wide {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }}
.alarm {{ border: 2px solid var(--bad); margin: 16px 0; }}
.good {{ color: var(--good); }} .bad, .alarm h3 {{ color: var(--bad); }}
.value {{ font-size: 1.6rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }}
.value small {{ font-size: .875rem; font-weight: 400; }}
.scroll {{ overflow-x: auto; margin-top: 12px; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }}
th, td {{ text-align: right; padding: 6px 0 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; padding-left: 0; min-width: 8.5em; }}
td.words {{ white-space: normal; text-align: left; min-width: 16em; }}
dt {{ font-weight: 600; margin-top: 8px; }} dd {{ margin: 0; }}
{CHART_STYLE}
@media (min-width: 960px) {{ .chart text {{ font-size: 11.5px; }} }}
@media (max-width: 480px) {{ .card {{ padding: 12px 10px; }} main {{ padding: 20px 12px 40px; }} }}
"""


Section = tuple[str, str, list[Chart | BarChart]]  # title, what it shows, charts
LONG_CELL = 30  # letters; what is longer is broken into lines


@dataclass(frozen=True)
class Parts:
    """What is on the page of one kind of result alone."""

    alarms: list[str]  # HTML
    summary: str
    cards: list[str]  # HTML
    sections: list[Section]
    facts: dict[str, str] = field(default_factory=dict)  # beside the definitions


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """The whole file; `style` is what this report has beyond the others."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n"
    )


def card(label: str, value: str, note: str) -> str:
    """A figure to be seen first. All three are HTML."""
    return f'<div class="card"><h3>{label}</h3><div class="value">{value}</div><div class="soft">{note}</div></div>'


def grid(items: Sequence[str], is_wide: bool = False) -> str:
    """Side by side as far as there is room."""
    kind = "wide " if is_wide else "four " if len(items) == 4 else ""
    return f'<div class="{kind}grid">{"".join(items)}</div>'


def alarm(title: str, sentences: Iterable[str]) -> str:
    """What nobody may miss."""
    lines = "".join(f"<div>{escape(sentence)}</div>" for sentence in sentences)
    return f'<div class="card alarm"><h3>{escape(title)}</h3>{lines}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="words"' if len(text) > LONG_CELL else ""
    return f"<td{kind}>{escape(text)}</td>"


def definitions(facts: Mapping[str, str]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in facts.items()) + "</dl>"
    )
