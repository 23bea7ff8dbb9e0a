"""Limits of a tenant, against a clock that the test turns."""

import random

import pytest

from vcli.server import limits
from vcli.server.limits import Bucket, Budget, Limits
from vcli.server.protocol import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    return clock


def refuse(reason: str, status: int, message: str, retry_after_s: int) -> ApiError:
    return ApiError(status, message, code=reason, retry_after_s=retry_after_s)


def retry_after(budget: Budget, num_sequences: int = 1) -> int:
    """Seconds that the tenant is told to wait; 0 when it is let in."""
    try:
        with budget.enter(num_sequences, refuse):
            return 0
    except ApiError as error:
        if error.status != 429:
            raise
        return int(error.headers["retry-after"])


def test_requests_are_let_in_at_their_rate(clock):
    budget = Budget(Limits(requests_per_minute=30))
    assert [retry_after(budget) for _ in range(31)] == [0] * 30 + [2]
    clock.now += 1.9
    assert retry_after(budget) == 1
    clock.now += 0.2
    assert [retry_after(budget), retry_after(budget)] == [0, 2]
    clock.now += 3600
    assert [retry_after(budget) for _ in range(31)] == [0] * 30 + [2], "no more than a minute's worth is saved up"


def test_a_request_for_n_answers_counts_as_n(clock):
    budget = Budget(Limits(requests_per_minute=60))
    assert [retry_after(budget, 40), retry_after(budget, 40), retry_after(budget, 1)] == [0, 0, 21]


def test_tokens_are_paid_back_before_the_next_request(clock):
    budget = Budget(Limits(tokens_per_minute=600))
    with budget.enter(1, refuse):
        budget.spend(500)
        budget.spend(1200)
    assert retry_after(budget) == 111  # 1,100 of debt and 1 to begin with, at 10 a second
    clock.now += 110.2
    assert retry_after(budget) == 0


def test_open_requests_are_counted_until_they_end(clock):
    budget = Budget(Limits(max_open_requests=2))
    with budget.enter(1, refuse), budget.enter(1, refuse):
        assert retry_after(budget) == 1
    assert retry_after(budget, 2) == 0
    with pytest.raises(ApiError, match="asks for 3 answers") as caught:
        retry_after(budget, 3)
    assert caught.value.status == 400, "waiting would not help"
    assert budget.num_open == 0


def test_over_any_time_no_more_is_taken_than_the_rate_allows(clock):
    draw = random.Random(0)
    for _ in range(50):
        per_minute, start = draw.randint(1, 1000), clock.now
        bucket, taken = Bucket(per_minute), 0
        for _ in range(300):
            clock.now += draw.expovariate(draw.choice([0.1, 1, 10]))
            if not bucket.wait_s():
                amount = draw.randint(1, 20)
                bucket.take(amount)
                taken += amount
            assert taken <= per_minute * (1 + (clock.now - start) / 60) + 20 + 1e-6


def test_a_tenant_that_waits_as_told_is_let_in(clock):
    draw = random.Random(1)
    bucket = Bucket(90)
    for _ in range(200):
        clock.now += bucket.wait_s() + 1e-9
        assert bucket.wait_s() == 0
        bucket.take(draw.randint(1, 500))
