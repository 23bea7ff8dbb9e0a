"""The page of a result: loud about what went wrong, drawn from the samples, and whole by itself."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from bench import report, result_page, sample_charts
from bench.charts import BarChart, Chart
from bench.result import BenchResult
from engine.errors import UserError
from tests.bench.results import make_comparison, make_engine, make_figure, make_result, make_samples, make_sweep


def drawn(result: BenchResult) -> dict[str, Chart | BarChart]:
    return {chart.title: chart for _, _, charts in result_page.parts_of(result).sections for chart in charts}


def line(result: BenchResult, title: str) -> list[tuple[float, float]]:
    chart = drawn(result)[title]
    assert isinstance(chart, Chart)
    return list(chart.series[0].points)


class TagCheck(HTMLParser):
    """Every tag that is opened is closed, in order; nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "make", [lambda: make_result(samples=make_samples()), make_result, make_sweep, make_comparison]
)
def test_a_page_is_well_formed_and_fetches_nothing(make):
    html = result_page.to_html(make())

    check = TagCheck()
    check.feed(html)
    assert check.open == []
    assert "url(" not in html
    assert "@import" not in html


def test_headline_definitions_and_command_are_on_the_page():
    html = result_page.to_html(make_result(samples=make_samples()))

    assert "Half of the requests get their first token within 500.0 ms. Then a token follows every 100.0 ms." in html
    assert re.search(r"TTFT</h3><div class=\"value\">500.0 <small>ms</small>", html)
    assert "vcli bench tiny" in html
    assert "request sent → first content token" in html


def test_failures_and_reasons_why_a_run_says_nothing_stand_first():
    reason = "the client was <late>"
    run = make_result(num_failed=2)
    run.metrics |= {"errors": {"HTTP 500: oh": 2}, "valid": False, "invalid_reasons": [reason]}

    html = result_page.to_html(run)

    assert "2 of 6 requests failed" in html
    assert "2 x HTTP 500: oh" in html
    assert "the client was &lt;late&gt;" in html
    assert html.index("Not a valid result") < html.index('<div class="grid">')
    assert "alarm" not in result_page.to_html(make_result()).partition("</head>")[2]


def test_latencies_come_from_the_samples_of_what_completed():
    ms = sample_charts.latencies_ms(make_samples())

    assert ms["ttft"] == pytest.approx([200, 300])
    assert ms["tpot"] == pytest.approx([100, 100])
    assert ms["itl"] == pytest.approx([100, 100, 100])
    assert ms["e2el"] == pytest.approx([400, 400])


def test_with_a_window_only_what_was_sent_and_what_came_in_it_is_drawn():
    run = make_result(samples=make_samples() | {"window": [0.35, 1.0]})

    assert run.samples
    ms = sample_charts.latencies_ms(run.samples)

    assert ms["ttft"] == pytest.approx([300])
    assert len(ms["itl"]) == 2  # of the first request its last token, of the second one all but the first
    assert "The figures are of the shaded time." in result_page.to_html(run)


def test_a_distribution_rises_from_0_to_100_percent():
    assert sample_charts.shares_below([30, 10, 20, 20]) == [(10, 0), (10, 25), (20, 50), (20, 75), (30, 100)]
    assert len(sample_charts.shares_below(list(range(100_000)))) <= sample_charts.MAX_POINTS + 1


def test_tokens_over_time_add_up_to_all_tokens():
    points = sample_charts.tokens_over_time(make_samples())

    assert sum(rate * (b - a) for (a, rate), (b, _) in itertools.pairwise(points)) == pytest.approx(5)
    assert points[-1][0] == pytest.approx(0.9)  # when the last one came


def test_queue_and_kv_cache_are_the_servers_own_figures():
    run = make_result(samples=make_samples())

    assert line(run, "Requests waiting on the server") == [(0.0, 1.0), (0.5, 0.0)]
    assert line(run, "KV cache in use, %") == [(0.0, 25.0), (0.5, 50.0)]
    assert line(run, "Requests under way") == [(0.0, 1), (0.4, 0), (0.5, 1), (0.9, 0)]


def test_no_peak_of_a_long_run_is_left_out():
    points = [(float(i), 90.0 if i == 7777 else 1.0) for i in range(20_000)]

    kept = sample_charts.peaks(points)

    assert len(kept) <= sample_charts.MAX_POINTS + 1
    assert max(value for _, value in kept) == 90.0
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert sample_charts.peaks(points[:100]) == points[:100]


def test_a_sweep_draws_throughput_against_latency_with_the_load_beside_each_dot():
    sweep = make_sweep()

    chart = drawn(sweep)["TTFT, ms"]

    assert isinstance(chart, Chart)
    assert [series.name for series in chart.series] == ["p50", "p99"]
    assert chart.series[0].points[0] == (sweep.runs[0].metrics["output_throughput"], pytest.approx(500))
    assert chart.series[1].labels == ["1", "16"]


def test_an_open_loop_without_a_rate_is_left_out_of_charts_over_the_rate():
    sweep = make_sweep()
    for run, rate in zip(sweep.runs, ("2.0", "inf"), strict=True):
        del run.workload["concurrency"]
        run.workload["request_rate"] = rate
        run.metrics["request_goodput"] = 1.0

    charts = drawn(sweep)

    assert line(sweep, "Tokens per second") == [(2.0, sweep.runs[0].metrics["output_throughput"])]
    goodput = charts["Requests per second"]
    assert isinstance(goodput, Chart)
    assert [series.points for series in goodput.series][1] == [(2.0, 1.0)]
    assert "inf req/s" in result_page.to_html(sweep)


def test_figures_of_old_results_have_a_page_but_no_picture():
    assert "All figures" in result_page.to_html(make_result())
    with pytest.raises(UserError, match="no samples"):
        result_page.to_svg(make_result())


def test_offline_results_have_charts_of_their_own():
    rows = [
        {"test": "tg128", "batch_size": size, "tokens_per_s": 50.0 * size, "std_tokens_per_s": 1.0, "ms": 20.0}
        | {"floor_ms": None}
        for size in (1, 8)
    ]
    workload = make_result().workload | {"device": "cpu", "dtype": "bfloat16", "quantization": "auto"}
    by_batch = make_result(kind="latency", workload=workload, metrics={"rows": rows})
    whole = make_result(
        kind="throughput", metrics={"output_throughput": 5.0, "decode_throughput": 8.0, "duration": 1.0}
    )

    assert line(by_batch, "tg128: tokens per second") == [(1, 50.0), (8, 400.0)]
    bars = drawn(whole)["Tokens per second"]
    assert isinstance(bars, BarChart)
    assert [bar.value for bar in bars.bars] == [5.0, 8.0]
    assert "tg128</h3>" in result_page.to_html(by_batch)
    assert "Output throughput" in result_page.to_html(whole)


def test_engines_stand_side_by_side_with_intervals_and_ratios():
    html = result_page.to_html(make_comparison())

    bars = drawn(make_comparison())["Output tokens per second, more is better"]
    assert isinstance(bars, BarChart)
    assert [(bar.name, bar.value, bar.note) for bar in bars.bars] == [
        ("vcli", 400.0, "1.00x"),
        ("transformers", 200.0, "0.50x"),
        ("vllm", None, "not installed"),
    ]
    assert (bars.bars[1].low, bars.bars[1].high) == (190.0, pytest.approx(220.0))
    assert "Of tokens a second, vcli gives 2.00 times as many as transformers." in html
    assert '<span class="good">1.82 to 2.11</span>, 97% sure' in html
    assert ">Not measured: no vllm is installed: pip install vllm<" in html
    assert "transformers serve tiny" in html


def test_an_engine_keeps_its_colour_where_another_has_no_figure():
    broken = make_engine("a", None, status="failed", reason="out of memory")
    comparison = make_comparison(broken, make_engine("vcli", 400.0))
    bars = drawn(comparison)["TTFT p50, ms, less is better"]

    assert "a was not measured</h3><div>out of memory</div>" in result_page.to_html(comparison)
    assert isinstance(bars, BarChart)
    assert [bar.name for bar in bars.bars] == ["vcli"]
    assert bars.colours == [1]


def test_a_difference_within_the_interval_is_none():
    figures = {"output_throughput": make_figure(390.0, 0.98)}
    even = make_comparison(make_engine("vcli", 400.0), make_engine("b", 390.0, figures=figures))

    assert "Between vcli and b no difference could be told." in result_page.to_html(even)


def test_few_rounds_are_told_to_be_few():
    comparison = make_comparison()
    comparison.metrics |= {"num_rounds": 2, "confidence": 0.5}

    assert "2 rounds are too few to be sure of that." in result_page.to_html(comparison)
    comparison.metrics |= {"num_rounds": 1, "confidence": 0.0}
    assert "One round is too few to be sure of that." in result_page.to_html(comparison)
    assert "too few" not in result_page.to_html(make_comparison())


def test_what_failed_in_a_comparison_is_told_with_its_words():
    rounds = [{"failed": 2, "errors": {"HTTP 500: oh": 2}}, {"failed": 1, "errors": {"HTTP 500: oh": 1}}]

    html = result_page.to_html(make_comparison(make_engine("vcli", 400.0, rounds=rounds)))

    assert "3 requests to vcli failed</h3><div>3 x HTTP 500: oh</div>" in html


def test_without_the_reference_there_are_figures_and_no_ratios():
    failed = make_engine("vcli", None, status="failed", reason="out of memory")
    other = make_engine("b", 200.0)
    for figure in other["figures"].values():
        del figure["ratio"], figure["ratio_interval"]

    html = result_page.to_html(make_comparison(failed, other))

    assert "vcli was not measured" in html
    assert ">200</text>" in html


def test_a_comparison_is_a_row_each_engine():
    columns, rows = report.tables(make_comparison())[0]

    assert columns[:3] == ["engine", "output tok/s", "x vcli"]
    assert rows[1][:4] == ["transformers 1.2", "200.0 (190.0 to 220.0)", "0.50 (0.47 to 0.55)", 50.0]
    assert rows[2][-1] == "missing: no vllm is installed: pip install vllm"
    assert len(report.to_csv(make_comparison()).splitlines()) == 4
