import random

import pytest

from engine.growth import FIRST_GUESS, AnswerLength, peak_growth


def simulated_peak(requests: list[tuple[int, int]]) -> int:
    """Step by step: everybody owns one block more, and who has ended owns none."""
    peak, now = 0, sum(owned for owned, _ in requests)
    for step in range(1, max((left for _, left in requests), default=0) + 1):
        alive = [owned + step for owned, left in requests if left >= step]
        peak = max(peak, sum(alive) - now)
    return peak


def test_the_peak_is_the_one_of_a_simulation():
    draw = random.Random(0)
    for _ in range(300):
        requests = [(draw.randrange(50), draw.randrange(40)) for _ in range(draw.randrange(12))]
        assert peak_growth(requests, block_size=1) == simulated_peak(requests), requests


def test_requests_that_end_make_room_for_those_that_go_on():
    assert peak_growth([(100, 10), (1, 90)], block_size=1) == 20
    assert peak_growth([(1, 10), (1, 90)], block_size=1) == 89
    assert peak_growth([], block_size=16) == 0


def test_blocks_are_of_many_tokens():
    assert peak_growth([(0, 160)] * 4, block_size=16) == 40


def test_answers_are_expected_to_be_as_long_as_those_before():
    length = AnswerLength()
    assert length.remaining(0, 10_000) == FIRST_GUESS
    assert length.remaining(0, 10) == 10
    for _ in range(200):
        length.add(100)
    assert length.remaining(0, 10_000) == pytest.approx(100, abs=1)
    assert length.remaining(80, 10_000) == pytest.approx(20, abs=1)
    assert length.remaining(400, 10_000) == 20, "longer than all others: a while yet"
    assert length.remaining(9_000, 10_000) == pytest.approx(100, abs=1), "but no longer than others from their start"
    assert length.remaining(400, 401) == 1
