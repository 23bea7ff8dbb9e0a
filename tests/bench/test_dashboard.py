"""The arithmetic of bench/dashboard.py on windows that are made up; a run takes minutes and is for people."""

import random

import pytest

from bench.dashboard import Plan, Window, report


def pairs(cost: float, noise: float, num_pairs: int = 200) -> list[tuple[Window, Window]]:
    """A server that needs 0.2 ms of its API process for a token, under a load that comes and goes, and a page."""
    draw = random.Random(0)

    def window(is_open: bool) -> Window:
        tokens_per_s = draw.uniform(200, 400)
        api = 2e-4 * tokens_per_s + (cost / 2 if is_open else 0.0) + draw.gauss(0, noise)
        return Window(tokens_per_s, 1.0 + api, api, 0.001 + (cost / 2 if is_open else 0.0))

    return [(window(True), window(False)) for _ in range(num_pairs)]


@pytest.mark.parametrize(
    ("cost", "noise", "verdict"),
    [(0.001, 0.001, "within"), (0.01, 0.001, "over"), (0.005, 0.01, "undecided"), (0.0, 0.1, "undecided")],
)
def test_the_verdict_is_certain_or_says_that_it_is_not(cost, noise, verdict):
    assert report(pairs(cost, noise), Plan())["verdict"] == verdict


def test_what_more_tokens_cost_is_not_the_pages():
    result = report(pairs(cost=0.002, noise=0.0), Plan())
    assert result["cost_in_api_process"]["mean"] == pytest.approx(0.001, abs=1e-9)
    assert result["cost_in_engine"]["mean"] == pytest.approx(0.001, abs=1e-9)


def test_one_pair_decides_nothing():
    assert report(pairs(0.0, 0.0, num_pairs=1), Plan())["verdict"] == "undecided"
