import pytest

from engine.recent import RecentLine, RecentMean


def test_a_mean_forgets_what_was_long_ago():
    mean = RecentMean()
    mean.add(1.0)
    mean.add(3.0)
    assert mean.value == 2.0
    for _ in range(1000):
        mean.add(7.0)
    assert mean.value == pytest.approx(7.0, rel=1e-3)


def test_a_line_follows_a_change_of_slope():
    line = RecentLine()
    for x in range(100):
        line.add(x % 10, 5.0 + x % 10)
    assert line.at(20) == pytest.approx(25, rel=0.05)
    for x in range(500):
        line.add(x % 10, 1.0 + 3 * (x % 10))
    assert line.at(20) == pytest.approx(61, rel=0.05)
