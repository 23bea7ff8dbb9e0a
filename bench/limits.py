"""How much a figure may change, and what trials say about it."""

import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, Self

from bench.metrics import serving_metrics
from bench.sequential import confidence_interval, evidence_above, evidence_below
from engine.errors import UserError

# Of the trials between one start of the engines and the next (bench/gate.py), over all limits.
ALARM_ERROR = 0.05
PASS_ERROR = 0.025  # to call a figure fine that is not
# What may be limited, by the name that a limit gives it.
FIGURES = {"throughput": "output_throughput"} | {
    name.removesuffix("_ms"): name
    for name in serving_metrics([])
    if re.match(r"(mean|median|p\d+)_\w+_ms$|\w+_throughput$", name)
}


class Verdict(StrEnum):
    FINE = "fine"
    REGRESSED = "regressed"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Limit:
    """How much a figure may change: `p99_itl<=+5%`, `throughput>=-3%`."""

    text: str
    key: str  # of the figure in a run's metrics
    is_ceiling: bool  # <=; else >=
    change: float  # 0.05

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UserError for what is no limit."""
        found = re.fullmatch(r"(\w+)\s*(<=|>=)\s*([-+]?\d+(?:\.\d+)?)\s*%", text.strip())
        if found is None:
            raise UserError(f"--metric {text!r}: must read like p99_itl<=+5% or throughput>=-3%")
        name, sign, percent = found.groups()
        if name.removesuffix("_ms") not in FIGURES:
            raise UserError(f"--metric {text!r}: no figure is called {name}; there are {', '.join(FIGURES)}")
        if float(percent) <= -100:
            raise UserError(f"--metric {text!r}: nothing can change by {percent} % or less")
        return cls(text.replace(" ", ""), FIGURES[name.removesuffix("_ms")], sign == "<=", float(percent) / 100)

    @property
    def log_change(self) -> float:
        """The limit as a log ratio, the higher the worse."""
        return self._worse(math.log1p(self.change))

    def log_ratio(self, before: dict[str, Any], after: dict[str, Any]) -> float:
        """How much worse `after` is than `before`. Raises UserError when one of them does not tell."""
        was, now = before.get(self.key), after.get(self.key)
        if not was or not now:
            raise UserError(f"--metric {self.text}: {self.key} is {was} on one side, {now} on the other: limit another")
        return self._worse(math.log(now / was))

    def as_change(self, log_ratio: float) -> float:
        """A log ratio, the higher the worse, as a change of the figure: 0.05 is 5 % more."""
        return math.expm1(self._worse(log_ratio)) if math.isfinite(log_ratio) else self._worse(log_ratio)

    def median_change(self, log_ratios: list[float]) -> float:
        return self.as_change(median(log_ratios))

    def estimate(self, log_ratios: list[float]) -> dict[str, Any]:
        """The median change, and the interval that holds it; None for a bound that is not known."""
        bounds = sorted(map(self.as_change, confidence_interval(log_ratios)))
        return {
            "measured": self.median_change(log_ratios) if log_ratios else None,
            "interval": [bound if math.isfinite(bound) else None for bound in bounds],
        }

    def _worse(self, log_ratio: float) -> float:
        return log_ratio if self.is_ceiling else -log_ratio

    def judge(self, log_ratios: list[float], num_limits: int) -> Verdict:
        if evidence_above(log_ratios, self.log_change) >= num_limits / ALARM_ERROR:
            return Verdict.REGRESSED
        is_fine = evidence_below(log_ratios, self.log_change) >= 1 / PASS_ERROR
        return Verdict.FINE if is_fine else Verdict.UNDECIDED


def read_limits(texts: Iterable[str]) -> list[Limit]:
    """Limits as given with --metric; one that ends in .toml is a file with a table [metrics] of them."""
    limits = []
    for text in texts:
        limits += _read_file(Path(text)) if text.endswith(".toml") else [Limit.parse(text)]
    return list(dict.fromkeys(limits))


def _read_file(path: Path) -> list[Limit]:
    try:
        metrics = tomllib.loads(path.read_text(encoding="utf-8"))["metrics"]
        return [Limit.parse(f"{name}{limit}") for name, limit in metrics.items()]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f'--metric {path}: needs a table [metrics] with lines like p99_itl = "<=+5%" ({error})'
        ) from None
