"""What is read out of a server's metrics, and said of it."""

import itertools
import time

import pytest

from bench.advice import in_words
from bench.watch import Scrape, Watched, advise, batch_table, stage_table, to_result, watch
from engine.errors import UserError


def watched(stages: dict[str, float], *, seconds: float = 10.0, **values: float) -> Watched:
    """Counters that rise from 0 to these values, gauges that stay; a KV cache that is half full."""
    gauges = {"num_requests_running": 8.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.5}
    counters = {"iteration_tokens_total_count": 100.0, "iteration_tokens_total_sum": 800.0}
    start = {name: value for name, value in (gauges | values).items() if name in gauges}
    end = Scrape(seconds, gauges | counters | values, {stage: 3 + own for stage, own in stages.items()})
    return Watched("http://here", [Scrape(0.0, start, dict.fromkeys(stages, 3.0)), end])


def first_words(of: Watched) -> str:
    return in_words(advise(of))[0]


def test_the_stages_add_up_to_the_time_between_two_readings():
    seen = watched({"forward": 6.0, "wait": 3.0, "update": 1.0})

    assert seen.coverage == pytest.approx(1.0)
    assert seen.share("forward", "wait") == pytest.approx(0.9)
    _, rows = stage_table(seen)
    assert rows[0][:3] == ["forward", 60_000.0, "60.0%"]
    assert ["tokens in a step", 8.0, None, None] in batch_table(seen)[1]
    assert to_result(seen).metrics["num_steps"] == 100


def test_an_idle_engine_is_not_the_bottleneck():
    assert first_words(watched({"idle": 8.0, "forward": 2.0})) == (
        "The bottleneck is not the engine: 80% of the time no request is there."
    )


def test_what_waits_for_blocks_is_told_from_what_waits_for_rows():
    stages = {"forward": 1.0, "wait": 9.0}

    full = watched(stages, num_requests_waiting=8.0, kv_cache_usage_perc=0.98)
    roomy = watched(stages, num_requests_waiting=8.0)

    assert "a full KV cache" in first_words(full)
    assert "although the KV cache has room" in first_words(roomy)
    assert "8 requests wait beside 8 that run" in first_words(roomy)


def test_preemptions_are_told_first():
    seen = watched({"forward": 1.0, "wait": 9.0}, num_preemptions_total=12.0)

    assert "12 times a request gave its blocks up" in first_words(seen)


def test_a_busy_host_is_told_with_its_largest_stage():
    words = first_words(watched({"forward": 5.0, "prepare": 4.0, "update": 1.0}))

    assert "the host's part of a step: 50% of the busy time is not the model's" in words
    assert "most of it goes to `prepare`" in words


def test_a_busy_model_is_to_be_looked_into():
    words = in_words(advise(watched({"forward": 1.0, "wait": 8.7, "update": 0.3})))

    assert words[0].startswith("The bottleneck is the model itself: 97% of the busy time")
    assert "`vcli profile MODEL`" in words[1]


def test_however_short_the_time_there_are_two_readings(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count(time.monotonic() - 100)  # each reading comes later than the last one should
    monkeypatch.setattr("bench.watch._scrape", lambda url, api_key: Scrape(next(clock), {}, {"idle": 1.0}))

    seen = watch("http://here", 0.001, lambda stage, share: None)

    assert (len(seen.scrapes), seen.seconds) == (2, 1.0)


def test_an_address_where_nobody_is_is_one_sentence():
    with pytest.raises(UserError, match=r"no metrics come from http://127.0.0.1:9 .*give the address of a running"):
        watch("http://127.0.0.1:9", 1.0, lambda stage, share: None)
