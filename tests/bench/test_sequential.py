"""The sequential test against noise that it was not told of."""

import math

import numpy as np
import pytest

from bench.sequential import confidence_interval, evidence_above, evidence_below

RNG = np.random.default_rng(0)
NUM_PAIRS = 80


def heavy_tails() -> list[float]:
    return (0.05 * RNG.standard_t(1.5, NUM_PAIRS)).tolist()


def bursts() -> list[float]:
    """Sizes that belong together, signs that are drawn by a coin: what the order of trials does to bursts of noise."""
    sizes = np.abs(np.cumsum(0.02 * RNG.standard_normal(NUM_PAIRS)))
    return (sizes * RNG.choice([-1, 1], NUM_PAIRS)).tolist()


def calm() -> list[float]:
    return (0.001 * RNG.standard_normal(NUM_PAIRS)).tolist()


@pytest.mark.parametrize("noise", [heavy_tails, bursts, calm])
@pytest.mark.parametrize("evidence", [evidence_above, evidence_below])
def test_whoever_looks_after_each_pair_is_wrong_no_more_often_than_said(noise, evidence):
    # The evidence is the most there ever was: it counts each look at the running test.
    num_wrong = sum(evidence(noise(), limit=0.0) >= 1 / 0.05 for _ in range(600))

    assert num_wrong <= 45  # 30 expected at most; 46 or more come in 0.3 % of such experiments


def test_a_change_is_found_in_either_direction():
    slower = [0.1 + x for x in calm()]

    assert evidence_above(slower, limit=0.05) > 1000
    assert evidence_below(slower, limit=0.15) > 1000
    assert evidence_below(slower, limit=0.05) < 2


def test_a_single_pair_that_went_wild_does_not_end_the_test():
    ratios = [0.1] * 10 + [-3.0] + [0.1] * 10

    assert evidence_above(ratios, limit=0.0) > 1000


def test_few_pairs_prove_nothing_however_clear_they_look():
    assert evidence_above([9.0] * 4, limit=0.0) <= 2**4
    assert confidence_interval([9.0] * 3) == (-math.inf, math.inf)


@pytest.mark.parametrize("noise", [heavy_tails, bursts])
def test_the_interval_holds_the_truth_and_shrinks(noise):
    intervals = [confidence_interval([0.2 + x for x in noise()]) for _ in range(60)]

    assert sum(low <= 0.2 <= high for low, high in intervals) >= 54
    assert all(high - low < 1 for low, high in intervals)


def test_the_interval_is_where_the_evidence_is_significant():
    ratios = [0.2 + x for x in heavy_tails()]
    low, high = confidence_interval(ratios, error=0.05)

    assert evidence_above(ratios, low) == pytest.approx(2 / 0.05, rel=0.02)
    assert evidence_below(ratios, high) == pytest.approx(2 / 0.05, rel=0.02)
