"""Means and lines through what was seen lately: they forget, so that they follow a load that changes."""

MEMORY = 64  # values after which one counts for about a third
LEAST_SPREAD = 0.01  # of x, as variance over squared mean: with less, a slope would be noise


class RecentMean:
    """The mean of the first values, then one that forgets."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.value = 0.0
        self.count = 0
        self._memory = memory

    def add(self, value: float, times: int = 1) -> None:
        self.count += times
        self.value += (value - self.value) * min(times / min(self.count, self._memory), 1.0)


class RecentLine:
    """y = a + b x through the points seen last, by least squares. b is never negative."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        keep = 1 - 1 / MEMORY
        sums = (self._weight, self._x, self._y, self._xx, self._xy)
        new = (1.0, x, y, x * x, x * y)
        self._weight, self._x, self._y, self._xx, self._xy = (keep * a + b for a, b in zip(sums, new, strict=True))

    def at(self, x: float) -> float:
        """y at x; 0 if no point was ever seen."""
        if not self._weight:
            return 0.0
        return max(self._y / self._weight + self._slope * (x - self._x / self._weight), 0.0)

    @property
    def _slope(self) -> float:
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        covariance = self._xy / self._weight - mean_x * mean_y
        spread = variance + LEAST_SPREAD * mean_x**2  # x that are nearly alike say nothing about others
        return max(covariance / spread, 0.0) if spread > 0 else 0.0
