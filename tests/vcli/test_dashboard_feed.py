"""What the dashboard is told: its percentiles, its slowest requests, and who may hear them."""

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from engine.messages import EngineStats
from engine.outputs import RequestTimings
from tests.vcli.conftest import Server, StartServer
from vcli.server.dashboard import feed
from vcli.server.dashboard.sampler import Sampler
from vcli.server.dashboard.slowest import NUM_SHOWN, Slowest
from vcli.server.recent_values import RecentValues

SHARES = (0.5, 0.95, 0.99)


def test_percentiles_are_those_of_the_window():
    draw, recent, ticks = random.Random(0), RecentValues(window=3), []
    for spread in (3.0, 0.2, 1.0, 0.5):  # the first tick leaves the window
        ticks.append([draw.lognormvariate(-4, spread) for _ in range(500)])
        for value in ticks[-1]:
            recent.add(value)
        recent.tick()
    window = np.concatenate(ticks[1:])
    assert recent.quantiles(SHARES) == pytest.approx(
        np.percentile(window, [50, 95, 99], method="inverted_cdf").tolist(), rel=0.02
    )


def test_a_value_counts_as_often_as_it_came_and_is_forgotten():
    recent = RecentValues(window=2)
    recent.add(0.1, times=99)
    recent.add(0.0)
    assert recent.quantiles() is None, "the second has not ended"
    recent.tick()
    assert recent.quantiles([0.02]) == pytest.approx([0.1], rel=0.02)
    recent.tick()
    recent.tick()
    assert recent.quantiles() is None


def timings(request_id: str, arrival: float, total: float) -> RequestTimings:
    """A request with a quarter of its time in the queue, and a quarter in its prefill."""
    scheduled, first = arrival + total / 4, arrival + total / 2
    return RequestTimings(arrival, 7, scheduled, first, arrival + total, 9, 2, ["stop"], request_id)


def test_the_slowest_requests_are_kept_in_their_parts(monkeypatch):
    slowest, now = Slowest(), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    spans = [random.Random(1).uniform(0.1, 5) for _ in range(100)]
    for i, span in enumerate(spans):
        slowest.note(timings(f"r{i}", now - span, span))
    under_way = RequestTimings(now - 9, 7, request_id="waits")
    first, *others = slowest.among([under_way])
    assert (first.id, first.outcome, first.total_s, first.queue_s) == ("waits", "waiting", 9.0, 9.0)
    assert [entry.total_s for entry in others] == pytest.approx(sorted(spans)[::-1][: NUM_SHOWN - 1], abs=1e-4)
    entry = others[0]
    assert [entry.queue_s, entry.prefill_s, entry.decode_s] == pytest.approx(
        [entry.total_s / 4, entry.total_s / 4, entry.total_s / 2], abs=2e-4
    )
    now += 660.0
    assert slowest.among([]) == []


def test_a_requests_ttft_counts_once_in_the_second_of_its_first_token():
    engine = SimpleNamespace(stats=EngineStats(), on_finish=[], open_requests=[])
    metrics = SimpleNamespace(recent_gaps=RecentValues(), model_name="m")
    sampler = Sampler(engine, SimpleNamespace(queue_s=lambda: 0.0), metrics)
    streams, waits, quick = (RequestTimings(10.0, 7, request_id="the same") for _ in range(3))
    engine.open_requests = [SimpleNamespace(timings=streams), SimpleNamespace(timings=waits)]
    assert sampler.sample().ttft_s is None

    streams.first_token_time = 11.0
    assert sampler.sample().ttft_s == pytest.approx([1, 1, 1], rel=0.03)

    quick.first_token_time = 14.0
    engine.open_requests = [SimpleNamespace(timings=waits)]
    for ended in (streams, quick):
        ended.finish_reasons.append("stop")
        engine.on_finish[0](ended)
    assert sampler.sample().ttft_s == pytest.approx([1, 4, 4], rel=0.03), "1 and 4: it came once"


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(FAKE_STEP_S="0.02").wait_ready()


def events(server: Server, **arguments: object) -> Iterator[tuple[str, dict]]:
    with httpx.stream("GET", f"{server.url}/dashboard/events", timeout=10, **arguments) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in reply.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


def test_the_feed_begins_with_its_history_and_counts_every_token(server):
    feed = events(server)
    assert [next(feed)[0] for _ in range(2)] == ["history", "state"]
    server.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 50})
    samples = [data for name, data in (next(feed) for _ in range(6)) if name == "sample"]
    feed.close()
    seconds = np.diff([sample["time"] for sample in samples])
    generated = sum(sample["generation_tokens_per_s"] * s for sample, s in zip(samples[1:], seconds, strict=True))
    generated += samples[0]["generation_tokens_per_s"]  # its second began about one before
    assert generated == pytest.approx(50, rel=0.1)
    assert samples[-1]["ttft_s"][0] <= samples[-1]["ttft_s"][2]


def test_the_page_may_load_nothing_from_elsewhere(server):
    reply = server.get("/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert "://" not in reply.text
    assert httpx.head(f"{server.url}/dashboard/events", timeout=10).status_code == 200, "and ends"
    for path in ("style.css", "page.js", "icon.svg"):
        assert server.get(f"/dashboard/{path}").status_code == 200
    assert {server.get(f"/dashboard/{path}").status_code for path in ("", "feed.py", "../page.js")} == {404}


def test_the_servers_own_page_may_use_it_and_others_may_not(server):
    ask = {"json": {"prompt": [5], "max_tokens": 1}}
    port = server.url.rsplit(":", 1)[1]
    own = {"origin": server.url}
    assert server.post("/v1/completions", headers=own, **ask).status_code == 200
    others = [
        {"origin": "http://elsewhere.example"},
        {"origin": f"http://127.0.0.1:{int(port) + 1}"},
        {"origin": f"http://rebound.example:{port}", "host": f"rebound.example:{port}"},
        {"origin": "null"},
    ]
    assert {server.post("/v1/completions", headers=each, **ask).status_code for each in others} == {403}
    by_name = {"origin": f"http://gpu-box:{port}", "host": f"gpu-box:{port}"}
    assert server.get("/dashboard/page.js", headers=by_name).status_code == 200, "browsers say an origin for scripts"


def test_there_is_an_end_to_viewers(server, monkeypatch):
    open_feeds = [events(server) for _ in range(feed.MAX_VIEWERS)]
    for each in open_feeds:
        next(each)
    refused = server.get("/dashboard/events")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, str(feed.RETRY_S))
    for each in open_feeds:
        each.close()
    with httpx.Client(timeout=10) as client:

        def is_let_in() -> bool:
            with client.stream("GET", f"{server.url}/dashboard/events") as reply:
                return reply.status_code == 200

        server.wait_until(is_let_in)
