"""A comparison of two checkpoints as a page.

Charts are bars in SVG, stretched to the room there is; their words are HTML, so that they stay legible on a phone.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from bench import page
from bench.quality import LayerError, Pair, Quality
from bench.quality_report import SPEEDS, busyness, describe_machine, megabytes, minutes, quality_table, shown

OWN_PARTS = {  # of a decoder layer; other parts are linear layers
    "layer alone": "What each layer gets wrong by itself",
    "up to the layer": "What has added up after each layer",
}
NOTABLE_PERC = 1.0  # a change of less is neither good nor bad
STYLE = """
:root { --after: var(--series-0); --before: var(--series-5); }
.legend, .ticks, .ends { color: var(--soft); font-size: .875rem; }
.plot { border-bottom: 1px solid var(--soft); margin-top: 8px; }
.plot svg { display: block; width: 100%; }
.plot .mean, .plot .p99 { stroke: var(--ink); stroke-width: 2; vector-effect: non-scaling-stroke; }
.plot .p99 { stroke: var(--bad); stroke-dasharray: 6 4; }
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
    return page.page(f"{quality.after} against {quality.before}", sections, STYLE)


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
        page.card("Same next token", f"{quality.top1_agreement:.1%}", "of the positions"),
        page.card(
            "KL divergence", f"{shown(kl['mean'])} <small>nats</small>", f"on average, 99% below {shown(kl['p99'])}"
        ),
        _pair_card("Weights in memory", quality.bytes, megabytes, less_is_better=True, unit="MB"),
    ]
    for label, name in (("Decode, batch 1", "decode_1"), ("Prefill", "prefill")):
        pair = quality.tokens_per_s[name]
        if _ratio(pair) is not None:
            cards.append(_pair_card(label, pair, shown, less_is_better=False, unit="tok/s"))
    return page.grid(cards)


def _pair_card(label: str, pair: Pair, show: Callable[[Any], str], *, less_is_better: bool, unit: str = "") -> str:
    ratio = _ratio(pair)
    assert ratio is not None, pair
    change = (ratio - 1) * 100
    verdict = "" if abs(change) < NOTABLE_PERC else "good" if (change < 0) == less_is_better else "bad"
    note = f'<span class="{verdict}">{change:+.1f}%</span> from {show(pair["before"])}'
    return page.card(label, f"{show(pair['after'])} <small>{unit}</small>", note)


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
{page.grid(panels, is_wide=True)}"""


def _layers(layers: Sequence[LayerError]) -> str:
    if not layers:
        return '<h2>Layers</h2><p class="soft">The layers of the two models are not alike: none can be compared.</p>'
    parts = {part: [e for e in layers if e.part == part] for part in dict.fromkeys(error.part for error in layers)}
    own = [_layer_panel(OWN_PARTS[part], errors, None) for part, errors in parts.items() if part in OWN_PARTS]
    linear = {part: errors for part, errors in parts.items() if part not in OWN_PARTS}
    text = f"""<h2>Layers</h2>
<p class="soft">The difference from the original, as a share of what should have come out.</p>
{page.grid(own, is_wide=True)}"""
    if linear:
        top = max(error.error for errors in linear.values() for error in errors)
        panels = "".join(_layer_panel(part, errors, top) for part, errors in linear.items())
        text += f"""<h2>Linear layers</h2>
<p class="soft">As the quantizer saw it: squared error over square, of the outputs on the calibration text, or of the
weights where there was none. One scale for all.</p><div class="four grid">{panels}</div>"""
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
    text, env = quality.text, quality.environment
    facts = {
        "text": f"{text['name']}, its first {text['windows']} x {text['window_tokens']:,} tokens",
        "machine": f"{describe_machine(quality)}, {quality.dtype}, torch {env.get('torch')}",
        "made": f"{env.get('date')} by vcli {env.get('vcli')}, revision {(env.get('git_revision') or 'unknown')[:9]}",
        "command": str(env.get("command")),
    }
    return f"""<h2>All figures</h2>
{page.table(columns, rows)}
<h2>What they are, and where they come from</h2>
{page.definitions(facts | quality.definitions)}"""


def _ratio(pair: Pair) -> float | None:
    before, after = pair["before"], pair["after"]
    return None if before is None or after is None else after / before
