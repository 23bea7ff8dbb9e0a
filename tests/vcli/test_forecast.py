"""What is foretold, against queues whose times are known."""

import pytest

from engine.outputs import RequestTimings
from vcli.server.forecast import Forecast

PREFILL_TOKEN_S, TOKEN_S = 0.001, 0.02


def timings(start: float, prompt: int, output: int, reasons: tuple[str, ...] = ("length",)) -> RequestTimings:
    first = start + 0.05 + PREFILL_TOKEN_S * prompt
    last = first + TOKEN_S * (output - 1)
    return RequestTimings(start - 1, prompt, start, first, last, output * len(reasons), finish_reasons=list(reasons))


def test_nothing_seen_takes_no_time():
    forecast = Forecast()
    assert forecast.wait_s(1000, 4) == forecast.answer_s(100_000, None, 5) == 0


def test_prompts_and_answers_take_what_such_ones_took():
    forecast = Forecast()
    for i in range(40):
        forecast.note(timings(i, prompt=100 * (1 + i % 9), output=50), 3, others_wait=False)
    assert forecast.prefill_s(2000) == pytest.approx(0.05 + 2000 * PREFILL_TOKEN_S, rel=0.05)
    assert forecast.decode_s(None) == forecast.decode_s(1000) == pytest.approx(49 * TOKEN_S)
    assert forecast.decode_s(11) == pytest.approx(10 * TOKEN_S)


def test_embeddings_tell_how_long_prompts_take_and_nothing_of_answers():
    forecast = Forecast()
    for i in range(40):
        embedded = RequestTimings(i - 1, 100 * (1 + i % 9), i, last_token_time=i + 0.5 * (1 + i % 9))
        embedded.finish_reasons = ["stop"]
        forecast.note(embedded, 3, others_wait=False)
    assert forecast.prefill_s(1000) == pytest.approx(5, rel=0.05)
    assert forecast.wait_s(8, 4) > 1
    assert forecast.output_tokens.count == 0


def test_an_answer_takes_less_where_fewer_run_and_no_more_where_more_do():
    forecast = Forecast()
    for i in range(40):
        forecast.note(timings(i, prompt=100, output=50), 15, others_wait=False)
    whole_s = 0.05 + 100 * PREFILL_TOKEN_S + 49 * TOKEN_S
    assert forecast.answer_s(100, None, 16) == forecast.answer_s(100, None, 99) == pytest.approx(whole_s)
    assert forecast.answer_s(100, None, 4) == pytest.approx(whole_s / 4)


def test_prompts_all_alike_say_nothing_about_longer_ones():
    forecast = Forecast()
    for i in range(40):
        forecast.note(timings(i, prompt=100 + i % 2, output=2), 3, others_wait=False)
    assert forecast.prefill_s(100_000) < 2 * forecast.prefill_s(100) + 100 * PREFILL_TOKEN_S


def test_before_any_queue_the_wait_follows_littles_law():
    forecast = Forecast()
    one = timings(0, prompt=50, output=11)
    forecast.note(one, 3, others_wait=False)
    held_s = one.last_token_time - one.scheduled_time
    assert forecast.wait_s(12, num_places=4) == pytest.approx(12 * held_s / 4)


def test_in_a_queue_the_wait_follows_the_ends_that_were_seen():
    """Two sequences end at once, every 3 seconds: 10 ends take 15."""
    forecast = Forecast()
    for i in range(30):
        for _ in range(2):
            forecast.note(timings(3.0 * i, prompt=50, output=11), 3, others_wait=True)
    assert forecast.wait_s(10, num_places=4) == pytest.approx(15, rel=0.05)


def test_a_time_without_queue_is_no_gap():
    forecast = Forecast()
    for start in (0, 1, 2):
        forecast.note(timings(start, prompt=50, output=11), 3, others_wait=True)
    forecast.note(timings(3, prompt=50, output=11), 3, others_wait=False)
    forecast.note(timings(1000, prompt=50, output=11), 3, others_wait=True)
    forecast.note(timings(1001, prompt=50, output=11), 3, others_wait=True)
    assert forecast.wait_s(1, num_places=4) == pytest.approx(1)


def test_sequences_of_one_request_count_each():
    forecast = Forecast()
    for i in range(10):
        forecast.note(timings(3.0 * i, prompt=50, output=11, reasons=("length",) * 3), 3, others_wait=True)
    assert forecast.wait_s(1, num_places=8) == pytest.approx(1)
    assert forecast.output_tokens.value == pytest.approx(11)


def test_aborted_answers_are_no_measure_of_length():
    forecast = Forecast()
    forecast.note(timings(0, prompt=5, output=40), 3, others_wait=False)
    forecast.note(timings(1, prompt=5, output=2, reasons=("abort",)), 3, others_wait=False)
    forecast.note(RequestTimings(arrival_time=3, num_prompt_tokens=9, finish_reasons=["abort"]), 3, others_wait=False)
    assert forecast.output_tokens.value == 40
