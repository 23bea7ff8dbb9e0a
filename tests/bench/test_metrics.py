"""The arithmetic of bench/metrics.py against timelines worked out by hand, and against numpy."""

import numpy as np
import pytest

from bench.metrics import RequestRecord, Window, latency_metrics, serving_metrics


def record(sent: float, *chunks: tuple[float, int], num_prompt_tokens: int = 10, error: str = "") -> RequestRecord:
    ended = chunks[-1][0] if chunks else sent + 1
    return RequestRecord(sent, list(chunks), ended, num_prompt_tokens, error)


def test_a_timeline_gives_the_figures_one_reads_off_it():
    one = record(100.0, (100.5, 1), (100.6, 1), (100.9, 1))

    assert one.ttft == pytest.approx(0.5)
    assert one.e2el == pytest.approx(0.9)
    assert one.tpot == pytest.approx(0.2)
    assert one.gaps == pytest.approx([0.1, 0.3])


def test_a_chunk_of_k_tokens_counts_as_k_gaps():
    one = record(0.0, (1.0, 1), (1.4, 4), (1.5, 1))

    assert one.num_output_tokens == 6
    assert one.gaps == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert one.tpot == pytest.approx(0.1)


def test_tokens_that_come_with_the_first_one_have_no_gap_to_it():
    one = record(0.0, (1.0, 3), (1.2, 2))

    assert one.gaps == pytest.approx([0.0, 0.0, 0.1, 0.1])
    assert sum(one.gaps) == pytest.approx(one.e2el - one.ttft)


def test_a_single_token_has_no_time_per_output_token():
    assert record(0.0, (1.0, 1)).tpot is None
    assert serving_metrics([record(0.0, (1.0, 1))])["p50_tpot_ms"] is None


def test_throughput_counts_completed_requests_over_the_whole_run():
    done = [record(10.0, (11.0, 2), num_prompt_tokens=6), record(12.0, (14.0, 8), num_prompt_tokens=4)]

    figures = serving_metrics([*done, record(10.0, (13.0, 5), error="broke off")])

    assert figures["duration"] == pytest.approx(4.0)
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (10, 10)
    assert figures["request_throughput"] == pytest.approx(0.5)
    assert figures["output_throughput"] == pytest.approx(2.5)
    assert figures["total_token_throughput"] == pytest.approx(5.0)
    assert figures["mean_ttft_ms"] == pytest.approx(1500.0)


def test_percentiles_are_numpys_in_milliseconds():
    seconds = np.random.default_rng(1).exponential(0.02, 1000)

    figures = latency_metrics("itl", list(seconds), None)

    for percentile in (50, 95, 99):
        assert figures[f"p{percentile}_itl_ms"] == pytest.approx(np.percentile(seconds, percentile) * 1e3)
    assert figures["median_itl_ms"] == figures["p50_itl_ms"]
    assert figures["mean_itl_ms"] == pytest.approx(seconds.mean() * 1e3)
    assert figures["std_itl_ms"] == pytest.approx(seconds.std() * 1e3)
    assert "adj_p99_itl_ms" not in figures


def test_gaps_of_all_requests_are_pooled():
    slow, fast = record(0.0, (1.0, 1), (2.0, 1)), record(0.0, *[(1.0 + i / 10, 1) for i in range(10)])

    assert serving_metrics([slow, fast])["mean_itl_ms"] == pytest.approx((1000 + 9 * 100) / 10)


def test_failed_requests_push_the_adjusted_percentile_up():
    seconds = [i / 1000 for i in range(1, 1000)]

    no_failure = latency_metrics("ttft", seconds, 0)
    few = latency_metrics("ttft", seconds[:995], 5)
    many = latency_metrics("ttft", seconds[:900], 100)

    assert no_failure["adj_p99_ttft_ms"] == no_failure["p99_ttft_ms"]
    assert few["adj_p99_ttft_ms"] == pytest.approx(990.0)  # the 990th of 1000, failures last
    assert few["adj_p99_ttft_ms"] > few["p99_ttft_ms"]
    assert many["adj_p99_ttft_ms"] is None  # it falls among the failures: infinite


def test_a_run_in_which_everything_failed_has_no_latencies():
    figures = serving_metrics([record(0.0, error="HTTP 500"), record(0.0, error="HTTP 500")])

    assert (figures["completed"], figures["failed"]) == (0, 2)
    assert figures["p99_e2el_ms"] is None
    assert figures["output_throughput"] == 0.0


def test_goodput_counts_requests_that_meet_every_objective_and_no_failures():
    quick = record(0.0, (0.4, 1), (0.5, 1), (0.6, 1))
    late = record(0.0, (0.6, 1), (0.7, 1), (0.8, 1))
    halting = record(0.0, (0.4, 1), (0.45, 1), (0.8, 1))  # its mean gap would do
    failed = record(0.0, (0.4, 1), (2.0, 1), error="broke off")

    def goodput(**slo: float) -> float:
        return serving_metrics([quick, late, halting, failed], slo=slo)["request_goodput"]

    assert goodput(ttft=0.5) * 2.0 == pytest.approx(2)
    assert goodput(ttft=0.5, itl=0.2) * 2.0 == pytest.approx(1)
    assert goodput(tpot=0.21, e2el=0.9) * 2.0 == pytest.approx(3)


def test_a_window_counts_what_was_sent_and_what_came_in_it():
    before = record(0.0, (1.0, 1), (2.0, 1), (3.0, 1), num_prompt_tokens=7)
    inside = record(2.0, (2.5, 1), (3.5, 2), num_prompt_tokens=5)
    after = record(4.5, (5.0, 1), num_prompt_tokens=3)

    figures = serving_metrics([before, inside, after], Window(1.5, 4.0))

    assert figures["duration"] == 2.5
    assert figures["completed"] == 1
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (5, 2 + 3)
    assert figures["request_throughput"] == pytest.approx(2 / 2.5)
    assert figures["mean_ttft_ms"] == pytest.approx(500)
    assert figures["mean_itl_ms"] == pytest.approx((1000 + 1000 + 500 + 500) / 4)


def test_steady_throughput_leaves_the_first_wave_and_the_last_out():
    """Two users, each with four requests of a second and one token: the middle of the run is steady."""
    records = [record(float(i), (i + 0.75, 4), (i + 1.0, 6)) for i in range(4) for _ in range(2)]

    figures = serving_metrics(records)

    assert figures["output_throughput"] == pytest.approx(80 / 4)
    assert figures["steady_output_throughput"] == pytest.approx((3 * 12 + 2 * 8) / 2)
    assert serving_metrics(records[:2])["steady_output_throughput"] is None
