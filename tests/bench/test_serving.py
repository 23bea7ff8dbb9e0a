"""A whole run against the fake server."""

import asyncio
import time

import pytest

from bench.client import LagMeter
from bench.metrics import RequestRecord
from bench.serving import Load, RunProgress, ServingRun, measure, parse_metrics, served_model, server_metrics
from bench.workloads import random_requests
from engine.errors import UserError

REQUESTS = random_requests(12, input_len=16, output_len=4, vocab_size=1000, seed=0)


def run(server, load: Load, **options) -> ServingRun:
    return asyncio.run(measure(server.url, "fake", REQUESTS, load, **options))


def test_a_closed_loop_run_counts_everything_once(fake_server):
    fake_server.first_token_s = fake_server.gap_s = 0.01
    seen: list[RunProgress] = []

    figures = run(fake_server, Load(concurrency=3), on_progress=seen.append).metrics()

    assert (figures["completed"], figures["failed"]) == (12, 0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (12 * 16, 12 * 4)
    assert figures["p50_ttft_ms"] >= 10
    assert figures["mean_e2el_ms"] >= figures["mean_ttft_ms"] + 3 * 10
    assert (seen[0].stage, seen[-1].num_done, seen[-1].num_output_tokens) == ("warm-up", 12, 48)


def test_requests_generate_their_length_greedily_and_in_a_cache_of_their_own(fake_server):
    run(fake_server, Load(concurrency=3))
    salts = {body["cache_salt"] for body in fake_server.bodies}
    run(fake_server, Load(concurrency=3))

    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in fake_server.bodies)
    assert len(salts) == 1
    assert len({body["cache_salt"] for body in fake_server.bodies}) == 2


def test_a_server_that_refuses_our_extra_fields_is_asked_without_them(fake_server):
    fake_server.knows_token_ids = False

    figures = run(fake_server, Load(concurrency=3)).metrics()

    assert (figures["completed"], figures["total_output_tokens"]) == (12, 48)


def test_an_open_loop_does_not_wait_for_answers(fake_server):
    fake_server.first_token_s = 0.5

    run(fake_server, Load(request_rate=float("inf")))

    assert fake_server.most_running == 12


def test_failures_are_shown_with_their_reason_and_do_not_spoil_the_rest(fake_server):
    fake_server.fail, fake_server.fail_every = "break", 5

    figures = run(fake_server, Load(concurrency=1)).metrics()

    assert figures["failed"] == 2  # the 5th and 10th of 13 requests, the warm-up's one among them
    assert figures["completed"] == 10
    assert figures["errors"] == {"the stream broke off before [DONE]": 2}
    assert figures["adj_p99_ttft_ms"] is None


def test_a_workload_that_the_server_refuses_ends_before_the_run(fake_server):
    fake_server.fail = "http"

    with pytest.raises(UserError, match="out of coffee"):
        run(fake_server, Load(concurrency=2))


def test_no_server_is_said_with_what_to_do():
    with pytest.raises(UserError, match="vcli serve"):
        asyncio.run(served_model("http://127.0.0.1:1"))


def test_the_servers_own_metrics_cover_the_run_and_not_what_was_before(fake_server):
    fake_server.first_token_s = 0.3

    figures = run(fake_server, Load(concurrency=12)).metrics()

    assert figures["kv_waste_perc"] == pytest.approx(2.0)
    assert figures["prefix_cache_hit_perc"] == pytest.approx(25.0)
    assert figures["num_preemptions"] == 0


def test_metrics_are_read_from_the_text_format_and_labels_are_summed():
    text = (
        "# HELP vcli:num_preemptions_total x\n# TYPE vcli:num_preemptions_total counter\n"
        'vcli:num_preemptions_total{engine="0"} 2\nvcli:num_preemptions_total{engine="1"} 3\n'
        "vcli:kv_cache_waste_perc 1.5e-02\nvcli:something_else 7\nprocess_cpu_seconds_total 1\n"
    )

    assert parse_metrics(text) == {"num_preemptions_total": 5.0, "kv_cache_waste_perc": 0.015}


def test_a_server_without_metrics_leaves_them_open():
    assert set(server_metrics([]).values()) == {None}
    assert set(server_metrics([{}, {}]).values()) == {None}


def test_waste_is_taken_while_the_server_has_work():
    idle = {"num_requests_running": 0.0, "kv_cache_waste_perc": 0.0}
    busy = [{"num_requests_running": 2.0, "kv_cache_waste_perc": waste} for waste in (0.01, 0.03)]

    figures = server_metrics([idle, *busy, idle])

    assert figures["kv_waste_perc"] == pytest.approx(2.0)
    assert figures["peak_kv_waste_perc"] == pytest.approx(3.0)


def test_a_late_client_makes_the_run_invalid_and_says_why():
    record = RequestRecord(0.0, [(1.0 + i * 0.01, 1) for i in range(11)], 1.2, 4)
    prompt, late, busy = ServingRun([record]), ServingRun([record]), ServingRun([record])
    prompt.lag.lags = [0.001] * 100
    late.lag.lags = [0.001] * 90 + [0.02] * 10
    busy.lag.cpu_share = 0.97

    assert prompt.metrics()["valid"]
    assert not late.metrics()["valid"]
    assert "late by 20.0 ms" in late.metrics()["invalid_reasons"][0]
    assert "97%" in busy.metrics()["invalid_reasons"][0]


def test_the_lag_meter_notices_a_blocked_loop():
    async def block() -> LagMeter:
        async with LagMeter() as lag:
            await asyncio.sleep(0.05)
            time.sleep(0.3)
            await asyncio.sleep(0.05)
        return lag

    lag = asyncio.run(block())

    assert max(lag.lags) > 0.2
