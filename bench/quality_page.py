"""A comparison of two checkpoints as one page that needs nothing beside it: no script, no font, no network.

Charts are bars in SVG, stretched to the room there is; their words are HTML, so that they stay legible on a phone.
Colours follow the reader's light or dark setting.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from bench.quality import LayerError, Pair, Quality
from bench.quality_report import SPEEDS, busyness, describe_machine, megabytes, minutes, quality_table, shown

OWN_PARTS = {  # of a decoder layer; other parts are linear layers
    "layer alone": "What each layer gets wrong by itself",
    "up to the layer": "What has added up after each layer",
}
NOTABLE_PERC = 1.0  # a change of less is neither good nor bad
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2430; --soft: #5b6675; --line: #dfe3e9;
  --after: #2563c9; --before: #9aa5b4; --good: #17703a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1b2129; --ink: #e8ecf1; --soft: #a3afbd; --line: #313a46;
    --after: #6ea8ff; --before: #66727f; --good: #6fd396; --bad: #ff9c94; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 4px; }
h3 { font-size: .95rem; margin: 0; }
p { margin: 0 0 12px; max-width: 75ch; }
.soft, .legend, .ticks, .ends, dl { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.1rem; margin: 16px 0 20px; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(max(160px, 30%), 1fr)); }
.panels { grid-template-columns: repeat(auto-fill, minmax(max(160px, 23%), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.value { font-size: 1.6rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.value small { font-size: .875rem; font-weight: 400; }
.good { color: var(--good); } .bad { color: var(--bad); }
.plot { border-bottom: 1px solid var(--soft); margin-top: 8px; }
svg { display: block; width: 100%; }
svg .mean, svg .p99 { stroke: var(--ink); stroke-width: 2; vector-effect: non-scaling-stroke; }
svg .p99 { stroke: var(--bad); stroke-dasharray: 6 4; }
.ticks { position: relative; height: 1.6em; }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.ends { display: flex; justify-content: space-between; }
.legend span { margin-right: 16px; white-space: nowrap; }
.key { display: inline-block; width: 16px; height: 10px; margin-right: 6px; border-radius: 2px; }
.key.mean, .key.p99 { height: 0; border-top: 3px solid var(--ink); border-radius: 0; vertical-align: middle; }
.key.p99 { border-top: 3px dashed var(--bad); }
.after { background: var(--after); fill: var(--after); } .before { background: var(--before); fill: var(--before); }
.bar { display: grid; grid-template-columns: 3.4em 1fr 4.6em; gap: 8px; align-items: center; margin-top: 6px;
  font-variant-numeric: tabular-nums; font-size: .875rem; }
.bar i { display: block; height: 12px; border-radius: 2px; }
.bar b { font-weight: 500; text-align: right; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { text-align: right; padding: 6px 0 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; padding-left: 0; }
dt { font-weight: 600; margin-top: 8px; } dd { margin: 0; }
"""


def to_html(quality: Quality) -> str:
    """The page."""
    made, recipe = "", quality.recipe or {}
    if "name" in recipe:
        made = f" Made by {recipe['name']}" + (f" in {minutes(recipe['seconds'])}." if "seconds" in recipe else ".")
    sections = [
        f"<h1>{escape(quality.after)}</h1>",
        f'<p class="soft">held against {escape(quality.before)}.{escape(made)}</p>',
        f'<p class="lead">{escape(summary(quality))}</p>',
        _cards(quality),
        _divergence(quality),
        _speed(quality),
        _layers(quality.layers),
        _figures(quality),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(quality.after)} against {escape(quality.before)}</title>\n<style>{STYLE}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def summary(quality: Quality) -> str:
    """What there is to know, in a few sentences."""
    worse, more = quality.ppl_increase_perc, (quality.bytes["after"] / quality.bytes["before"] - 1) * 100
    how = f"{abs(worse):.1f}% {'worse' if worse > 0 else 'better'} than" if abs(worse) >= 0.05 else "as well as"
    size = f"{abs(more):.0f}% {'more' if more > 0 else 'less'}" if abs(more) >= 0.5 else "as much"
    before, after = quality.perplexity["before"], quality.perplexity["after"]
    sentences = [
        f"It predicts the text {how} the original (perplexity {shown(before)} to {shown(after)}), and at "
        f"{quality.top1_agreement:.1%} of the positions both find the same next token most likely.",
        f"Its weights take {size} memory.",
    ]
    if (ratio := _ratio(quality.tokens_per_s["decode_1"])) is not None and not busyness(quality):
        sentences.append(f"A request alone is answered at {ratio:.2f} times the speed.")
    return " ".join(sentences)


def _cards(quality: Quality) -> str:
    kl = quality.kl
    cards = [
        _pair_card("Perplexity", quality.perplexity, shown, less_is_better=True),
        _card("Same next token", f"{quality.top1_agreement:.1%}", "of the positions"),
        _card("KL divergence", f"{shown(kl['mean'])} <small>nats</small>", f"on average, 99% below {shown(kl['p99'])}"),
        _pair_card("Weights in memory", quality.bytes, megabytes, less_is_better=True, unit="MB"),
    ]
    for label, name in (("Decode, batch 1", "decode_1"), ("Prefill", "prefill")):
        pair = quality.tokens_per_s[name]
        if _ratio(pair) is not None:
            cards.append(_pair_card(label, pair, shown, less_is_better=False, unit="tok/s"))
    return f'<div class="grid">{"".join(cards)}</div>'


def _pair_card(label: str, pair: Pair, show: Callable[[Any], str], *, less_is_better: bool, unit: str = "") -> str:
    ratio = _ratio(pair)
    assert ratio is not None, pair
    change = (ratio - 1) * 100
    verdict = "" if abs(change) < NOTABLE_PERC else "good" if (change < 0) == less_is_better else "bad"
    note = f'<span class="{verdict}">{change:+.1f}%</span> from {show(pair["before"])}'
    return _card(label, f"{show(pair['after'])} <small>{unit}</small>", note)


def _card(label: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{label}</h3><div class="value">{value}</div><div class="soft">{note}</div></div>'


def _divergence(quality: Quality) -> str:
    edges, shares = quality.kl_histogram["edges"], quality.kl_histogram["shares"]
    used = [i for i, share in enumerate(shares) if share]
    shares, edges = shares[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
    low, high = math.log10(edges[0]), math.log10(edges[-1])

    def place(value: float) -> float:
        return 100 * (math.log10(value) - low) / (high - low)

    lines = "".join(
        f'<line class="{name}" x1="{place(value):.2f}" x2="{place(value):.2f}" y1="0" y2="100"/>'
        for name in ("mean", "p99")
        if edges[0] < (value := quality.kl[name]) < edges[-1]
    )
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    ticks = "".join(
        f'<span style="left:{place(10.0**n):.2f}%">10<sup>{n}</sup></span>' for n in decades[:: -(-len(decades) // 6)]
    )
    titles = [
        f"{share:.2%} between {shown(a)} and {shown(b)} nats"
        for share, a, b in zip(shares, edges, edges[1:], strict=False)
    ]
    return f"""<h2>How far its predictions moved</h2>
<p class="soft">KL divergence of the next token's distribution at each of {quality.text["scored_tokens"]:,} positions of
the text, in nats on a logarithmic scale. 0 is no change; far to the right lie the few tokens that changed most.</p>
<div class="card"><div class="legend"><span><i class="key mean"></i>mean {shown(quality.kl["mean"])}</span>
<span><i class="key p99"></i>99th percentile {shown(quality.kl["p99"])}</span></div>
{_bars("share of the positions by KL divergence", shares, max(shares), titles, 160, lines)}
<div class="ticks">{ticks}</div></div>"""


def _speed(quality: Quality) -> str:
    panels = []
    for label, name in SPEEDS:
        pair = quality.tokens_per_s[name]
        longest = max((rate for rate in pair.values() if rate is not None), default=None)
        bars = "".join(
            f'<div class="bar"><span>{which}</span><i class="{which}" style="width:{100 * rate / longest:.1f}%"></i>'
            f"<b>{shown(rate)}</b></div>"
            for which, rate in pair.items()
            if rate is not None and longest
        )
        none = '<p class="soft">not measured: no room for so many requests</p>'
        panels.append(f'<div class="card"><h3>{label.capitalize()}</h3>{bars or none}</div>')
    busy = busyness(quality)
    warning = f' <span class="bad">{busy[0].upper()}{busy[1:]}.</span>' if busy else ""
    return f"""<h2>Speed</h2>
<p class="soft">Tokens per second on {escape(describe_machine(quality))}, more is better.{warning}</p>
<div class="wide grid">{"".join(panels)}</div>"""


def _layers(layers: Sequence[LayerError]) -> str:
    if not layers:
        return '<h2>Layers</h2><p class="soft">The layers of the two models are not alike: none can be compared.</p>'
    parts = {part: [e for e in layers if e.part == part] for part in dict.fromkeys(error.part for error in layers)}
    own = [_layer_panel(OWN_PARTS[part], errors, None) for part, errors in parts.items() if part in OWN_PARTS]
    linear = {part: errors for part, errors in parts.items() if part not in OWN_PARTS}
    text = f"""<h2>Layers</h2>
<p class="soft">The difference from the original, as a share of what should have come out.</p>
<div class="wide grid">{"".join(own)}</div>"""
    if linear:
        top = max(error.error for errors in linear.values() for error in errors)
        panels = "".join(_layer_panel(part, errors, top) for part, errors in linear.items())
        text += f"""<h2>Linear layers</h2>
<p class="soft">As the quantizer saw it: squared error over square, of the outputs on the calibration text, or of the
weights where there was none. One scale for all.</p><div class="panels grid">{panels}</div>"""
    return text


def _layer_panel(title: str, errors: list[LayerError], top: float | None) -> str:
    worst = max(errors, key=lambda error: error.error)
    titles = [f"layer {error.layer}: {shown(error.error)}" for error in errors]
    bars = _bars(title, [error.error for error in errors], top or worst.error, titles, 90)
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="soft">at most {shown(worst.error)}, in layer '
        f'{worst.layer}</div>{bars}<div class="ends"><span>layer {errors[0].layer}</span>'
        f"<span>layer {errors[-1].layer}</span></div></div>"
    )


def _bars(title: str, values: Sequence[float], top: float, titles: Sequence[str], height: int, extra: str = "") -> str:
    """A chart of bars side by side, [0, top] high; `extra` lies over them, in percent of width and height."""
    width = 100 / len(values)
    bars = []
    for i, (value, words) in enumerate(zip(values, titles, strict=True)):
        share = 100 * value / top if top else 0
        bars.append(
            f'<rect class="after" x="{(i + 0.08) * width:.3f}" y="{100 - share:.2f}" width="{0.84 * width:.3f}" '
            f'height="{share:.2f}"><title>{escape(words)}</title></rect>'
        )
    return (
        f'<div class="plot"><svg role="img" aria-label="{escape(title)}" viewBox="0 0 100 100" height="{height}" '
        f'preserveAspectRatio="none">{"".join(bars)}{extra}</svg></div>'
    )


def _figures(quality: Quality) -> str:
    columns, rows = quality_table(quality)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    text, env = quality.text, quality.environment
    facts = {
        "text": f"{text['name']}, its first {text['windows']} x {text['window_tokens']:,} tokens",
        "machine": f"{describe_machine(quality)}, {quality.dtype}, torch {env.get('torch')}",
        "made": f"{env.get('date')} by vcli {env.get('vcli')}, revision {(env.get('git_revision') or 'unknown')[:9]}",
        "command": str(env.get("command")),
    }
    described = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in (facts | quality.definitions).items()
    )
    return f"""<h2>All figures</h2>
<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<h2>What they are, and where they come from</h2>
<dl>{described}</dl>"""


def _ratio(pair: Pair) -> float | None:
    before, after = pair["before"], pair["after"]
    return None if before is None or after is None else after / before
