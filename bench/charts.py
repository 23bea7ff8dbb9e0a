"""Line and bar charts as SVG: each is whole by itself, in a page as in a file.

A chart is drawn 400 wide and stretched to the room there is; its words are wide enough to be read on a phone. Colours
are variables of the page's style (`COLORS`), or the light ones of them in a picture that is a file.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from engine.errors import UserError

Point = tuple[float, float]
WIDTH, HEIGHT = 400, 250
MARGIN = 12
BAR_HEIGHT = 42  # with its name
MAX_DECADES = 10
LETTER = 7.2  # width of a letter at most, in the units of the chart
FONTS = ("DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica")  # of pictures in pixels
COLORS = {  # name: in light, in dark
    "page": ("#f6f7f9", "#12161c"),
    "card": ("#fff", "#1b2129"),
    "ink": ("#1b2430", "#e8ecf1"),
    "soft": ("#5b6675", "#a3afbd"),
    "line": ("#dfe3e9", "#313a46"),
    "good": ("#17703a", "#6fd396"),
    "bad": ("#b3261e", "#ff9c94"),
    "series-0": ("#2563c9", "#6ea8ff"),
    "series-1": ("#c2570c", "#f5a35c"),
    "series-2": ("#0f7f74", "#4fd1c1"),
    "series-3": ("#8b3fc9", "#c99bff"),
    "series-4": ("#b8336a", "#ff8fb8"),
    "series-5": ("#66727f", "#9aa5b4"),
}
MAX_SERIES = sum(name.startswith("series-") for name in COLORS)
STYLE = "\n".join(
    [
        ".chart { display: block; width: 100%; height: auto; }",
        ".chart text { font: 13px system-ui, sans-serif; fill: var(--soft); }",
        ".chart .title { font-weight: 600; fill: var(--ink); }",
        ".chart .name { fill: var(--ink); }",
        ".chart .grid-line { stroke: var(--line); stroke-width: 1; }",
        ".chart .axis { stroke: var(--soft); stroke-width: 1; }",
        ".chart .shade { fill: var(--series-0); opacity: .1; }",
        ".chart .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }",
        ".chart .mark { stroke: var(--ink); stroke-width: 1.5; }",
        ".chart .late { stroke: var(--bad); stroke-dasharray: 5 4; }",
        ".chart .error-bar { stroke: var(--ink); stroke-width: 1.5; }",
        *(f".chart .s{i} {{ stroke: var(--series-{i}); }}" for i in range(MAX_SERIES)),
        *(f".chart .f{i} {{ fill: var(--series-{i}); }}" for i in range(MAX_SERIES)),
    ]
)


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    labels: Sequence[str] = ()  # one a point, which then has a dot; an empty one is not written
    is_stepped: bool = False  # a value holds until the next


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes. `title` says what y is, and its unit."""

    title: str
    x_label: str
    series: Sequence[Series]
    marks: Sequence[tuple[str, float]] = ()  # words and x of upright lines: a usual value, then late ones
    shade: tuple[float, float] | None = None  # from and to, on x
    log_x: bool = False
    log_y: bool = False
    y_top: float | None = None  # of a scale that has an end, such as 100 %

    def svg(self) -> str:
        return _svg(self.title, self.content(), WIDTH, self.height)

    @property
    def height(self) -> float:
        return HEIGHT

    def content(self) -> str:
        points = [point for series in self.series for point in series.points]
        xs = [x for x, _ in points] + [x for _, x in self.marks]
        x_axis = _axis(xs, self.log_x, ends_with_values=True)
        y_axis = _axis([y for _, y in points], self.log_y, top=self.y_top)
        legend, top = self._legend()
        left = max(len(shorten(tick)) for tick in y_axis.ticks) * LETTER + MARGIN + 4
        top += 28 if any(series.labels for series in self.series) else 14
        frame = _Frame(x_axis, y_axis, left, top, WIDTH - MARGIN - 6, HEIGHT - 42)
        parts = [_title(self.title), *legend]
        if self.shade:
            edges = [min(max(frame.x(x), frame.left), frame.right) for x in self.shade]
            parts.append(_rect("shade", edges[0], frame.top, edges[1] - edges[0], frame.bottom - frame.top))
        parts += frame.grid()
        for i, (words, x) in enumerate(self.marks):
            kind = "mark late" if i else "mark"
            parts.append(_line(kind, frame.x(x), frame.top, frame.x(x), frame.bottom, title=words))
        for i, series in enumerate(self.series):
            parts += _curve(series, i % MAX_SERIES, frame)
        parts += _point_labels(self.series, frame)
        parts.append(_text(self.x_label, (frame.left + frame.right) / 2, HEIGHT - 8, "middle"))
        return "".join(parts)

    def _legend(self) -> tuple[list[str], float]:
        """What the lines are, in as many rows as it takes, and where the last row stands."""
        entries = [(series.name, f"curve s{i % MAX_SERIES}") for i, series in enumerate(self.series) if series.name]
        entries += [(words, "mark late" if i else "mark") for i, (words, _) in enumerate(self.marks)]
        parts: list[str] = []
        x, y = float(MARGIN), 38.0
        for name, kind in entries:
            words = _fit(name, WIDTH - 2 * MARGIN - 24)
            width = 24 + len(words) * LETTER + 10
            if x > MARGIN and x + width > WIDTH:
                x, y = MARGIN, y + 18
            parts += [_line(kind, x, y - 4, x + 18, y - 4), _text(words, x + 24, y, "start", "name")]
            x += width
        return parts, y if entries else 20.0


@dataclass(frozen=True)
class Bar:
    name: str
    value: float | None  # None: there is none, and `note` says why
    low: float | None = None  # ends of the error bar
    high: float | None = None
    note: str = ""  # beside the value


@dataclass(frozen=True)
class BarChart:
    """Bars that lie, one below the other from 0, each under its name."""

    title: str
    bars: Sequence[Bar]
    colours: Sequence[int] = ()  # of each bar; empty: one after the other

    def svg(self) -> str:
        return _svg(self.title, self.content(), WIDTH, self.height)

    @property
    def height(self) -> float:
        return 30 + BAR_HEIGHT * len(self.bars) + 6

    def content(self) -> str:
        parts = [_title(self.title)]
        longest = max((bar.high or bar.value or 0.0 for bar in self.bars), default=0.0) or 1.0
        scale = (WIDTH - 2 * MARGIN) / longest
        for i, bar in enumerate(self.bars):
            y = 30 + i * BAR_HEIGHT
            words = " · ".join(part for part in (shorten(bar.value) if bar.value is not None else "", bar.note) if part)
            name = _fit(bar.name, WIDTH - 3 * MARGIN - len(words) * LETTER)
            parts.append(_text(name, MARGIN, y + 14, "start", "name"))
            parts.append(_text(words, WIDTH - MARGIN, y + 14, "end"))
            if bar.value is not None:
                colour = self.colours[i] if self.colours else i
                parts.append(_rect(f"f{colour % MAX_SERIES}", MARGIN, y + 20, bar.value * scale, 12))
            if bar.low is not None and bar.high is not None:
                low, high = MARGIN + bar.low * scale, MARGIN + bar.high * scale
                parts.append(_line("error-bar", low, y + 26, high, y + 26))
                parts += [_line("error-bar", x, y + 22, x, y + 30) for x in (low, high)]
        return "".join(parts)


def picture(title: str, charts: Sequence[Chart | BarChart], note: str = "") -> str:
    """All charts as one SVG file, two side by side, in the light colours."""
    rows = [charts[i : i + 2] for i in range(0, len(charts), 2)]
    gap, y = 16.0, 44.0
    parts = []
    for row in rows:
        parts += [
            f'<g transform="translate({gap + i * (WIDTH + gap):g} {y:g})">'
            f"{_rect('panel', 0, 0, WIDTH, max(each.height for each in row))}{chart.content()}</g>"
            for i, chart in enumerate(row)
        ]
        y += max(chart.height for chart in row) + gap
    width = gap + min(len(charts), 2) * (WIDTH + gap)
    parts.append(_text(_fit(title, width - 2 * gap), gap, 28, "start", "title"))
    parts.append(_text(_fit(note, width - 2 * gap), gap, y + 4, "start"))
    light = {name: light for name, (light, _) in COLORS.items()}
    style = f"{STYLE}\n.chart .panel {{ fill: var(--card); stroke: var(--line); }}"
    style = re.sub(r"var\(--([\w-]+)\)", lambda match: light[match[1]], style)
    background = f'<rect width="100%" height="100%" fill="{light["page"]}"/>'
    return _svg(title, f"<style>{style}</style>{background}{''.join(parts)}", width, y + (gap if note else 0))


def png(svg: str) -> bytes:
    """The picture in pixels, twice as many as it has units. Raises UserError where that cannot be done."""
    return _pixels(svg, check_png(), zoom=2)


def check_png() -> str:
    """The font that words are drawn with. Raises UserError where there is none, or nothing to draw with."""
    sheet = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
    letter = '<text y="16" font-family="sans-serif">M</text>'
    try:
        for font in FONTS:
            if _pixels(sheet.format(letter), font) != _pixels(sheet.format(""), font):
                return font
    except ImportError:
        raise UserError("a .png needs resvg-py: pip install 'vcli[png]', or write .svg") from None
    raise UserError(f"a .png needs one of the fonts {', '.join(FONTS)}: install fonts-dejavu-core, or write .svg")


def _pixels(svg: str, font: str, zoom: int = 1) -> bytes:
    from resvg_py import svg_to_bytes

    return bytes(svg_to_bytes(svg_string=svg, zoom=zoom, font_family=font, sans_serif_family=font))


def shorten(value: float) -> str:
    """1,234 and 12.3k and 0.12: enough to read off an axis."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}" if abs(value) / scale < 1000 else f"{value / scale:,.0f}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: list[float]
    is_log: bool

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return (value - low) / (high - low)


def _axis(values: Sequence[float], is_log: bool, ends_with_values: bool = False, top: float | None = None) -> _Axis:
    """A scale from 0 (if it is not logarithmic), with a few round ticks; it ends at a tick, or with the values."""
    if is_log:
        positive = [value for value in values if value > 0] or [1.0]
        first = max(i for i, step in enumerate(_ROUND) if step <= min(positive) * (1 + 1e-9))
        last = min(i for i, step in enumerate(_ROUND) if step >= max(positive) * (1 - 1e-9))
        ticks = _ROUND[first : max(last, first + 1) + 1]
        decades = [tick for tick in ticks if _ROUND.index(tick) % 3 == 0]
        shown = decades if len(ticks) > 7 else ticks
        every = math.ceil(len(shown) / MAX_DECADES)  # of many, one in two or three has its words
        return _Axis(ticks[0], ticks[-1], shown[::every], is_log=True)
    high = top or max(values, default=0.0) or 1.0
    step = next(step for step in _ROUND if high / step <= 5)
    ticks = [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]
    if ends_with_values:
        ticks = [tick for tick in ticks if tick <= high * (1 + 1e-9)]
    return _Axis(0.0, high if ends_with_values else ticks[-1], ticks, is_log=False)


_ROUND = [m * 10.0**n for n in range(-9, 13) for m in (1, 2, 5)]


@dataclass(frozen=True)
class _Frame:
    """Where on the picture the axes lie."""

    x_axis: _Axis
    y_axis: _Axis
    left: float
    top: float
    right: float
    bottom: float

    def x(self, value: float) -> float:
        return self.left + self.x_axis.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.share(value) * (self.bottom - self.top)

    def grid(self) -> list[str]:
        parts = []
        for tick in self.y_axis.ticks:
            y = self.y(tick)
            parts.append(_line("axis" if tick == self.y_axis.low else "grid-line", self.left, y, self.right, y))
            parts.append(_text(shorten(tick), self.left - 6, y + 4.5, "end"))
        last_end = -math.inf
        for tick in self.x_axis.ticks:
            words, x = shorten(tick), self.x(tick)
            half = len(words) * LETTER / 2
            x_text = min(max(x, half), WIDTH - half - 2)
            if x_text - half < last_end + 6:
                continue
            parts.append(_line("axis", x, self.bottom, x, self.bottom + 4))
            parts.append(_text(words, x_text, self.bottom + 18, "middle"))
            last_end = x_text + half
        return parts


def _curve(series: Series, index: int, frame: _Frame) -> list[str]:
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    if series.is_stepped:
        corners = ((place, (after[0], place[1])) for place, after in itertools.pairwise(places))
        places = [*itertools.chain.from_iterable(corners), *places[-1:]]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in _without_repeats(places))
    parts = [f'<polyline class="curve s{index}" points="{line}"><title>{escape(series.name)}</title></polyline>']
    for (x, y), label in zip(series.points, series.labels, strict=False):
        words = escape(f"{series.name} {label}: {shorten(y)} at {shorten(x)}".strip())
        place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"'
        parts.append(f'<circle class="f{index}" {place} r="4"><title>{words}</title></circle>')
    return parts


def _point_labels(all_series: Sequence[Series], frame: _Frame) -> list[str]:
    """Words above the dots, but for those that would lie over other words or dots."""
    parts: list[str] = []
    taken = [
        (frame.x(x) - 4, frame.y(y) - 4, frame.x(x) + 4, frame.y(y) + 4)
        for series in all_series
        if series.labels
        for x, y in series.points
    ]
    for series in reversed(all_series):
        for (x, y), label in zip(series.points, series.labels, strict=False):
            half = len(label) * LETTER / 2
            centre = min(max(frame.x(x), frame.left + half), frame.right - half)
            box = (centre - half, frame.y(y) - 20, centre + half, frame.y(y) - 5)
            if label and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(_text(label, centre, frame.y(y) - 8, "middle", "name"))
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _without_repeats(places: Iterable[Point]) -> list[Point]:
    """Without points that would be drawn on the place of the one before."""
    return [place for place, _ in itertools.groupby((round(x, 1), round(y, 1)) for x, y in places)]


def _svg(title: str, content: str, width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">{content}</svg>'
    )


def _fit(words: str, width: float) -> str:
    """As many of the words as there is room for."""
    most = int(width / LETTER)
    return words if len(words) <= most else words[: most - 1] + "…"


def _title(words: str) -> str:
    return _text(_fit(words, WIDTH - 2 * MARGIN), MARGIN, 18, "start", "title")


def _text(words: str, x: float, y: float, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{inside}</line>'


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"/>'
