"""Is one side slower than it may be? A test of paired trials that may be looked at after each of them.

A pair gives the log ratio of the two sides' figures, measured one after the other in an order drawn by a coin. On
unchanged code the coin alone decides which of two trials is called which, so the log ratio is as likely to be +x as -x,
whatever the machine's noise is like: drifts, bursts and heavy tails included. That is all the test asks for.

It is a game against that claim. With a limit m on the log ratio, each pair multiplies a gambler's wealth by
1 + b tanh(c (log ratio - m)), a fair or losing bet as long as the true log ratio is at most m; by Ville's inequality
such wealth ever reaches 1 / error with a probability of at most `error`. Another one bets the other way. The wealth is
the mean over GAMBLERS, since nobody knows beforehand how noisy the pairs are. (Testing by betting: Shafer 2021;
Waudby-Smith and Ramdas 2024; with nothing but symmetry: de la Peña 1999.)
"""

from collections.abc import Sequence

import numpy as np

# A gambler's sharpness, at which log ratios its stake is nearly whole, and its stake: what one lost bet can cost.
GAMBLERS = [(sharpness, stake) for sharpness in (10, 40, 160) for stake in (0.5, 0.95)]
WIDEST = 5.0  # log ratios beyond e^5 either way are as good as infinite


def evidence_above(log_ratios: Sequence[float], limit: float) -> float:
    """The most wealth at any time of who bets that the log ratio is above `limit`: 1 / error, to be significant."""
    x = np.asarray(log_ratios, dtype=np.float64) - limit
    if not len(x):
        return 1.0
    sharpness, stake = np.array(GAMBLERS).T[:, :, None]
    wealth = np.cumprod(1 + stake * np.tanh(sharpness * x), axis=1).mean(axis=0)  # [pairs]
    return max(1.0, float(wealth.max()))


def evidence_below(log_ratios: Sequence[float], limit: float) -> float:
    """As `evidence_above`, for who bets that the log ratio is below `limit`."""
    return evidence_above([-x for x in log_ratios], -limit)


def confidence_interval(log_ratios: Sequence[float], error: float = 0.05) -> tuple[float, float]:
    """The log ratios that the pairs do not speak against; infinite where a few pairs cannot say.

    Holds the true one at all times together with a probability of at least 1 - error.
    """
    return -_upper_bound([-x for x in log_ratios], error / 2), _upper_bound(log_ratios, error / 2)


def _upper_bound(log_ratios: Sequence[float], error: float) -> float:
    """The smallest limit that the log ratio is significantly below, by bisection: evidence grows with the limit."""
    low, high = -WIDEST, WIDEST
    if evidence_below(log_ratios, high) < 1 / error:
        return float("inf")
    while high - low > 1e-5:
        middle = (low + high) / 2
        if evidence_below(log_ratios, middle) < 1 / error:
            low = middle
        else:
            high = middle
    return high
