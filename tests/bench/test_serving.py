"""A whole run against the fake server."""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bench.client_processes import ClientProcesses, SharedTurnstile, _own_moments, _Task
from bench.load import LagMeter, Load, arrivals, open_loop
from bench.metrics import RequestRecord
from bench.serving import RunProgress, ServingRun, measure, served_model, server_metrics
from bench.workloads import Answer, BenchRequest, random_requests
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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


def test_the_wait_for_a_turn_among_all_at_once_is_no_lag():
    """Sending them takes half a second, in which the loop itself is never late."""

    class Client:
        clock = staticmethod(time.perf_counter)

        async def exchange(self, request: BenchRequest) -> tuple[RequestRecord, Answer]:
            time.sleep(0.005)
            return RequestRecord(self.clock()), Answer()

    def lags(rate: float) -> list[float]:
        lag, task = LagMeter(), _Task(0, 1, {}, REQUESTS * 8, Load(request_rate=rate))
        moments, turnstile = _own_moments(task, Client.clock()), SharedTurnstile(limit=len(task.requests))
        asyncio.run(open_loop(Client(), task.requests, moments, turnstile, lag, lambda record: None))
        return lag.lags

    assert lags(float("inf")) == []
    assert max(lags(1e6)) > 0.1  # who asks for a rate is told that it was not kept


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
    fine = LagMeter([0.0] * 95 + [0.001] * 5, cpu_share=0.5)

    def reasons(lag: LagMeter) -> list[str]:
        return ServingRun([record], [fine, lag]).metrics()["invalid_reasons"]

    assert reasons(fine) == []
    assert "late by 20.0 ms, with 10.0 ms between tokens (both p99)" in reasons(LagMeter([0.001] * 90 + [0.02] * 10))[0]
    assert "late by 2.0 ms on average, with 10.0 ms between tokens" in reasons(LagMeter([0.002] * 100))[0]
    assert "97%" in reasons(LagMeter(cpu_share=0.97))[0]


def test_the_lag_meter_notices_a_blocked_loop():
    async def block() -> LagMeter:
        lag = LagMeter()
        async with lag.watching():
            await asyncio.sleep(0.05)
            time.sleep(0.3)
            await asyncio.sleep(0.05)
        return lag

    lag = asyncio.run(block())

    assert max(lag.lags) > 0.2


def test_a_closed_loop_keeps_its_number_of_requests_under_way(fake_server):
    fake_server.first_token_s = 0.05

    figures = run(fake_server, Load(concurrency=4)).metrics()

    assert fake_server.most_running == 4
    assert figures["max_concurrent_requests"] == 4


def several_processes(monkeypatch) -> None:
    """One for every two streams, three at most."""
    monkeypatch.setattr("bench.client_processes.STREAMS_PER_PROCESS", 2)
    monkeypatch.setattr("bench.client_processes.CORES_PER_PROCESS", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(3))


def test_several_processes_send_what_one_would(fake_server, monkeypatch):
    several_processes(monkeypatch)
    fake_server.first_token_s = 0.05

    figures = run(fake_server, Load(concurrency=6)).metrics()

    assert figures["num_client_processes"] == 3
    assert (figures["completed"], fake_server.most_running) == (12, 6)
    assert sorted(body["prompt"] for body in fake_server.bodies[6:]) == sorted(r.prompt for r in REQUESTS)


def test_a_client_process_imports_what_it_needs_and_not_its_parents_program(fake_server, tmp_path):
    program = tmp_path / "heavy.py"
    program.write_text(f"""
import asyncio, os, sys
if __name__ != "__main__":
    sys.exit("imported by a client")
from bench.load import Load
from bench.serving import measure
from bench.workloads import BenchRequest
run = asyncio.run(measure({fake_server.url!r}, "fake", [BenchRequest(2, [1])], Load(concurrency=1)))
print(len(run.records))
""")

    done = subprocess.run([sys.executable, program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)

    assert done.stdout == b"1\n", done.stderr.decode()


def test_samples_hold_what_the_figures_were_made_from(fake_server):
    fake_server.fail, fake_server.fail_every, fake_server.gap_s = "break", 5, 0.01

    measured = run(fake_server, Load(concurrency=1))

    figures, samples = measured.metrics(), measured.samples()
    requests = samples["requests"]
    assert [bool(error) for error in requests["error"]] == [bool(r.error) for r in measured.records]
    assert len(samples["gaps"]) == 10 * 3
    assert requests["sent"] == sorted(requests["sent"])
    assert min(requests["sent"]) >= 0
    assert sum(n for n, error in zip(requests["num_output_tokens"], requests["error"], strict=True) if not error) == 40
    ttfts = [ttft for ttft, error in zip(requests["ttft"], requests["error"], strict=True) if not error]
    assert figures["mean_ttft_ms"] == pytest.approx(sum(ttfts) / 10 * 1e3, abs=0.001)
    assert len(samples["server"]["time"]) == len(samples["server"]["num_requests_running"]) >= 2


def test_a_run_of_a_certain_time_leaves_ramp_up_and_ramp_down_out(fake_server):
    fake_server.first_token_s, fake_server.gap_s = 0.1, 0.01
    stages: list[str] = []

    measured = run(fake_server, Load(concurrency=3, duration_s=1.5), on_progress=lambda p: stages.append(p.stage))

    figures, window = measured.metrics(), measured.window
    assert window is not None
    assert figures["duration"] == pytest.approx(1.5)
    assert sum(record.ended < window.start for record in measured.records) >= 2
    assert max(record.sent for record in measured.records) <= window.end < max(r.ended for r in measured.records)
    assert 0 < figures["completed"] == sum(record.sent in window for record in measured.records)
    assert figures["completed"] < len(measured.records)
    assert list(dict.fromkeys(stages)) == ["warm-up", "ramp-up", "measuring"]


def test_a_time_in_which_no_request_begins_and_ends_is_no_result(fake_server):
    fake_server.first_token_s = 2.0

    figures = run(fake_server, Load(concurrency=3, duration_s=0.2)).metrics()

    assert figures["completed"] == 0
    assert "--duration is too short" in figures["invalid_reasons"][0]


def test_the_end_of_the_time_does_not_wait_for_the_next_arrival(fake_server):
    (first,) = itertools.islice(arrivals(Load(request_rate=0.001), REQUESTS), 1)
    start = time.monotonic()

    figures = run(fake_server, Load(request_rate=0.001, duration_s=0.2)).metrics()

    assert time.monotonic() - start < 60 < first
    assert figures["invalid_reasons"] == ["no request completed"]


def test_requests_sent_again_are_kept_from_the_prefix_cache(fake_server):
    measured = run(fake_server, Load(concurrency=4, duration_s=1.0))

    bodies = fake_server.bodies[4:]  # those before were the warm-up's
    assert len(bodies) == len(measured.records) > len(REQUESTS)
    seen = {(tuple(body["prompt"]), body["cache_salt"]) for body in bodies}
    assert len(seen) == len(bodies)


def test_a_client_that_is_held_up_says_so_itself(fake_server):
    """Its process is stopped for half of the time, as on a machine that has too much to do."""
    fake_server.gap_s = 0.02
    running = threading.Event()

    def hold_up() -> None:
        running.wait(30)
        while running.is_set():
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.suspend()
                    time.sleep(0.05)
                    child.resume()
            time.sleep(0.05)

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        requests = [replace(request, output_len=30) for request in REQUESTS]
        load = Load(concurrency=4)
        progress = lambda p: running.set() if p.stage == "measuring" else None  # noqa: E731
        figures = asyncio.run(measure(fake_server.url, "fake", requests, load, on_progress=progress)).metrics()
    finally:
        running.clear()
        thread.join()

    assert figures["completed"] == 12
    assert not figures["valid"]
    assert "the client was late by" in figures["invalid_reasons"][0]


def test_a_client_process_that_dies_before_the_word_is_the_same_error(fake_server):
    async def killed() -> None:
        async with ClientProcesses({"url": fake_server.url, "model": "fake"}, REQUESTS, Load(concurrency=2)) as clients:
            for process in clients._processes:
                process.kill()
                process.join()
            await clients.run(lambda record: None)

    with pytest.raises(UserError, match="a process of the load client ended"):
        asyncio.run(killed())


def test_a_client_process_that_dies_is_an_error_and_leaves_none_behind(fake_server, monkeypatch):
    fake_server.first_token_s = 30.0

    several_processes(monkeypatch)

    def kill_client() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if clients := [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]:
                clients[0].kill()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_client)

    async def killed() -> None:
        async with ClientProcesses({"url": fake_server.url, "model": "fake"}, REQUESTS, Load(concurrency=4)) as clients:
            thread.start()
            with pytest.raises(UserError, match="a process of the load client ended"):
                await clients.run(lambda record: None)

            assert len(asyncio.all_tasks()) == 1  # the other process is not waited for any more

    asyncio.run(killed())
    thread.join()
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_a_server_that_answers_nothing_any_more_is_given_up(fake_server, monkeypatch):
    monkeypatch.setattr("bench.serving.MAX_FAILURES_IN_A_ROW", 5)
    fake_server.fail, fake_server.fail_from = "http", 20

    requests = random_requests(10_000, input_len=4, output_len=2, vocab_size=1000, seed=0)
    figures = asyncio.run(measure(fake_server.url, "fake", requests, Load(concurrency=2))).metrics()

    assert 5 <= figures["failed"] < 100
    assert "given up after 5 failures in a row" in figures["invalid_reasons"]


def test_a_conversation_waits_for_each_answer_and_takes_it_along(fake_server):
    requests = random_requests(6, input_len=16, output_len=4, vocab_size=1000, seed=0, turns=3)
    fake_server.first_token_s = 0.02

    measured = asyncio.run(measure(fake_server.url, "fake", requests, Load(concurrency=2)))

    bodies = fake_server.bodies[2:]  # without the warm-up
    assert fake_server.most_running == 2
    assert sorted(len(body["prompt"]) for body in bodies) == [16] * 6 + [36] * 6 + [56] * 6
    first = requests[0].prompt
    (second,) = (body["prompt"] for body in bodies if len(body["prompt"]) == 36 and body["prompt"][:16] == first)
    assert second == [*first, *[1] * 4, *requests[0].then.prompt]
    assert sum(record.ends_conversation for record in measured.records) == 6
    assert measured.metrics()["completed"] == 18


def test_a_trace_is_sent_when_it_says(fake_server):
    requests = [replace(request, arrival=0.15 * i) for i, request in enumerate(REQUESTS[:6])]

    samples = asyncio.run(measure(fake_server.url, "fake", requests, Load())).samples()

    late = [sent - 0.15 * i for i, sent in enumerate(samples["requests"]["sent"])]
    assert (
        min(late) > -0.005
    )  # it waits for the moment, by a timer of milliseconds, and then as long as the machine lets it


def test_what_a_server_does_not_count_is_counted_by_the_tokenizer(fake_server):
    fake_server.sends_usage, fake_server.knows_token_ids = False, False
    fake_server.tokens_per_chunk, fake_server.gap_s = 2, 0.2

    async def measured() -> ServingRun:
        requests = [BenchRequest(4, "one two three"), BenchRequest(4, [5] * 7)]
        count = lambda text: 3 * len(text.split())  # noqa: E731  # a tokenizer of three tokens a word
        return await measure(fake_server.url, "fake", requests, Load(concurrency=1), count_tokens=count)

    text, ids = asyncio.run(measured()).records

    assert (text.num_prompt_tokens, text.num_output_tokens) == (9, 12)
    assert (ids.num_prompt_tokens, ids.num_output_tokens) == (7, 12)
    assert [num_tokens for _, num_tokens in text.chunks] == [6, 6]


def test_without_a_tokenizer_a_server_that_does_not_count_is_refused_with_the_way_out(fake_server):
    fake_server.sends_usage = False

    with pytest.raises(UserError, match="--tokenizer"):
        run(fake_server, Load(concurrency=1))
