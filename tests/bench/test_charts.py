"""Charts: what is drawn where, which words stand at the axes, and pictures as files."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench import charts
from bench.charts import Bar, BarChart, Chart, Series

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(f"{SVG}text"))


def corners(svg: str) -> list[tuple[float, float]]:
    line = next(ET.fromstring(svg).iter(f"{SVG}polyline")).get("points", "")
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.split())]


def test_points_lie_in_proportion():
    (x0, y0), (x1, y1), (x2, y2) = corners(Chart("c", "s", [Series("", [(0, 0), (25, 50), (100, 100)])]).svg())

    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=0.001)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.5, abs=0.001)
    assert y2 < y0


def test_on_a_logarithmic_scale_equal_ratios_are_equally_far_apart():
    (x0, _), (x1, _), (x2, _) = corners(Chart("c", "ms", [Series("", [(1, 1), (10, 2), (100, 3)])], log_x=True).svg())

    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)


def test_a_step_holds_its_value_until_the_next():
    places = corners(Chart("c", "s", [Series("", [(0, 1), (10, 2)], is_stepped=True)]).svg())

    assert places[1] == (places[2][0], places[0][1])


def test_axes_have_a_few_round_numbers():
    words = [text.text for text in texts(Chart("c", "s", [Series("", [(0, 3), (47, 870)])]).svg())]

    assert words == ["c", "0", "200", "400", "600", "800", "1,000", "0", "10", "20", "30", "40", "s"]


numbers = st.one_of(st.integers(0, 10**9), st.floats(0, 1e3).map(lambda value: round(value, 6)))


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
)
@example([(0, 6.1e-05), (0, 100_000_001)], False, True)
@example([(6.1e-05, 0), (100_000_001, 0)], True, False)
def test_whatever_the_values_are_the_words_stay_inside_and_apart(
    points: list[tuple[float, float]], log_x: bool, log_y: bool
):
    points = sorted(points)
    labels = [str(2**i) for i in range(len(points))]
    series = [
        Series("a name of some length", points, labels),
        Series("another", points),
        Series("a third one" * 9, points),
    ]

    boxes = []
    for text in texts(Chart("c", "s", series, log_x=log_x, log_y=log_y).svg()):
        width, x, y = len(text.text or "") * 6.5, float(text.get("x", 0)), float(text.get("y", 0))
        left = {"middle": x - width / 2, "end": x - width}.get(text.get("text-anchor", ""), x)
        boxes.append((left, y - 10, left + width, y, text.text))
        assert left >= -1
        assert left + width <= charts.WIDTH + 1
        assert 0 <= y <= charts.HEIGHT

    for a, b in itertools.combinations(boxes, 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (a, b)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.25, "0.25"), (999, "999"), (1500, "1,500"), (20000, "20k"), (1250000, "1.25M"), (3e9, "3G")],
)
def test_numbers_are_short(value: float, words: str):
    assert charts.shorten(value) == words


def test_bars_are_as_long_as_their_values_with_their_intervals_upon_them():
    bars = [Bar("a", 100.0, 90.0, 120.0), Bar("b", 50.0, note="1.00x"), Bar("c", None, note="not installed")]

    svg = BarChart("tok/s", bars).svg()

    first, second = ET.fromstring(svg).iter(f"{SVG}rect")
    whiskers = [line for line in ET.fromstring(svg).iter(f"{SVG}line") if line.get("y1") == line.get("y2")]
    longest = float(first.get("width", 0))
    assert float(second.get("width", 0)) == pytest.approx(longest / 2, abs=0.1)
    assert float(whiskers[0].get("x2", 0)) - float(whiskers[0].get("x1", 0)) == pytest.approx(0.3 * longest, abs=0.2)
    assert [text.text for text in texts(svg)] == ["tok/s", "a", "100", "b", "50 · 1.00x", "c", "not installed"]


def test_a_name_without_room_is_cut_before_its_value():
    words = [
        text.text or "" for text in texts(BarChart("c" * 99, [Bar("https://" + 99 * "a", 1234.0, note="2.00x")]).svg())
    ]

    assert words[0].endswith("c…")
    assert words[1].endswith("a…")
    assert words[2] == "1,234 · 2.00x"
    assert len(words[1] + words[2]) * 6.5 < charts.WIDTH


def test_a_picture_has_its_colours_in_it_and_becomes_pixels():
    chart = Chart("<throughput> & co", "s", [Series("", [(0, 1), (1, 2)])])

    svg = charts.picture("title", [chart, chart, BarChart("bars", [Bar("a", 1.0)])], "how it was made")

    assert "var(" not in svg
    words = [text.text for text in texts(svg)]
    assert words.count("<throughput> & co") == 2
    assert {"title", "how it was made"} <= set(words)
    width, height = re.search(r'width="(\d+)" height="(\d+)"', svg).groups()  # type: ignore[union-attr]
    pixels = charts.png(svg)
    assert [int.from_bytes(pixels[i : i + 4], "big") for i in (16, 20)] == [2 * int(width), 2 * int(height)]
