import random

import pytest

from engine.step_time import StepTime

DECODE_S, TOKEN_S = 0.010, 0.00005


def test_nothing_is_known_before_a_step_has_done_both():
    time = StepTime()
    time.add(0, 500, 1.0)
    time.add(8, 0, DECODE_S)
    assert time.prompt_tokens_within(1.0) is None


def test_a_chunk_fills_the_time_that_decodes_leave():
    time = StepTime()
    for num_tokens in (100, 700):
        time.add(8, 0, DECODE_S)
        time.add(8, num_tokens, DECODE_S + TOKEN_S * num_tokens)
    assert time.prompt_tokens_within(0.030) == pytest.approx(400, abs=1)
    assert time.prompt_tokens_within(0.005) == 0


def test_what_a_prompt_takes_is_still_known_after_many_steps_without_one():
    time = StepTime()
    time.add(8, 0, DECODE_S)
    time.add(8, 100, DECODE_S + TOKEN_S * 100)
    for _ in range(1000):
        time.add(64, 0, 2 * DECODE_S)
    assert time.prompt_tokens_within(0.030) == pytest.approx(200, abs=1)


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_chunks_keep_their_time_when_a_device_becomes_slower_and_no_step_only_decodes(slower: float):
    time, draw = StepTime(), random.Random(0)
    time.add(8, 0, DECODE_S)
    time.add(8, 100, DECODE_S + TOKEN_S * 100)
    took = []
    for _ in range(300):
        num_tokens = max(time.prompt_tokens_within(0.050), 16)
        took.append(slower * (DECODE_S + TOKEN_S * num_tokens) * draw.uniform(0.9, 1.1))
        time.add(8, num_tokens, took[-1])
    assert sum(took[-100:]) / 100 == pytest.approx(0.050, rel=0.03)
