"""What the figures mean, and the arithmetic from time stamps to figures.

Every figure that is printed is defined in `DEFINITIONS`, and is a pure function of the records of the requests. Tokens
are counted by the server's tokenizer, never by the number of chunks.
"""

import bisect
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

PERCENTILES = (50, 95, 99)
MIN_STEADY_SHARE = 0.25  # of a run: a shorter steady part says little

DEFINITIONS = {
    "TTFT": "request sent → first content token",
    "TPOT": "(E2EL - TTFT) / (output tokens - 1), of each request; undefined for one token",
    "ITL": "every gap between two tokens, pooled over all requests; a chunk of k tokens counts as k gaps",
    "E2EL": "request sent → last token",
    "adj_": "the percentile with every failed request counted as infinitely late",
    "throughput": "of completed requests, per second from the first request sent to the last one ended",
    "KV waste": "token slots in allocated KV blocks that hold no token, as a share of the allocated ones",
    "client lag": "how much later than due the load client's event loop woke up (beyond its timer's 1 ms), p99",
}
STEADY_DEFINITION = {
    "steady throughput": "the same between ramp-up (until as many requests have ended as are under way) and ramp-down "
    "(from the last request sent)",
}
# What takes the place of throughput in a run of a certain time.
WINDOW_DEFINITIONS = {
    "window": "what counts: after ramp-up (until as many requests have ended as are under way) and before ramp-down "
    "(no more are sent); latencies are of requests sent in it, ITL is of tokens that came in it; the first requests of "
    "a closed loop are cut short, each less than the one before, so that the next ones do not come in waves",
    "throughput": "of completed requests, what came in the window, per second of it",
}
GOODPUT_DEFINITION = {
    "goodput": "completed requests that met every objective, per second; itl holds for every gap of a request"
}


@dataclass
class RequestRecord:
    """One request as the client saw it. Times are seconds of one clock."""

    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)  # time and number of tokens of each arrival
    ended: float = 0.0
    num_prompt_tokens: int = 0
    error: str = ""  # empty: it completed
    ends_conversation: bool = True  # False: its next turn follows
    uncounted: tuple[str, str] | None = None  # prompt and answer of a server that does not count; chunks holds events

    @property
    def num_output_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.chunks)

    @property
    def ttft(self) -> float:
        return self.chunks[0][0] - self.sent

    @property
    def e2el(self) -> float:
        return self.chunks[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """One gap for each token after the first: together they last from the first to the last token."""
        return self.gaps_in(Window(-math.inf, math.inf))

    def gaps_in(self, window: "Window") -> list[float]:
        """The gaps before tokens that came in the window."""
        gaps = [0.0] * (self.chunks[0][1] - 1) if self.chunks[0][0] in window else []  # they came with the first token
        for (before, _), (now, num_tokens) in itertools.pairwise(self.chunks):
            if now in window:
                gaps += [(now - before) / num_tokens] * num_tokens
        return gaps

    def meets(self, slo: dict[str, float]) -> bool:
        """Is every latency within its objective? A request of one token has no tpot and no itl, and meets them."""
        taken = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "itl": max(self.gaps, default=0.0), "e2el": self.e2el}
        return all(taken[name] <= seconds for name, seconds in slo.items())


class Window(NamedTuple):
    """A part of a run: requests sent in it count, and tokens that came in it."""

    start: float
    end: float

    def __contains__(self, moment: object) -> bool:
        return isinstance(moment, float) and self.start <= moment <= self.end


def is_ramped_up(num_sent: int, num_ended: int) -> bool:
    """Have as many requests ended as are under way? Those of the first moment have then made room for others."""
    return num_ended > 0 and num_ended >= num_sent - num_ended


def steady_window(records: list[RequestRecord]) -> Window | None:
    """From the end of ramp-up to the last request sent; None where there is no such time."""
    sent = sorted(record.sent for record in records)
    for num_ended, moment in enumerate(sorted(record.ended for record in records), 1):
        if is_ramped_up(bisect.bisect_right(sent, moment), num_ended):
            return Window(moment, sent[-1]) if moment < sent[-1] else None
    return None


def serving_metrics(
    records: list[RequestRecord], window: Window | None = None, slo: dict[str, float] | None = None
) -> dict[str, Any]:
    """The figures of a run or of a window of it, with the keys of `vllm bench serve` where the meaning is the same.

    `slo` gives the seconds that a request's ttft, tpot, itl or e2el may take.
    """
    whole = Window(min((r.sent for r in records), default=0.0), max((r.ended for r in records), default=0.0))
    window, steady = window or whole, None if window else steady_window(records)
    measured = [record for record in records if record.sent in window]
    completed = [record for record in measured if not record.error]
    num_failed, duration = len(measured) - len(completed), window.end - window.start
    came = work_in(records, window)
    tpots = [record.tpot for record in completed]
    gaps = [gap for record in records if not record.error for gap in record.gaps_in(window)]
    figures = {
        "duration": duration,
        "completed": len(completed),
        "failed": num_failed,
        "total_input_tokens": came.num_prompt_tokens,
        "total_output_tokens": came.num_output_tokens,
        "request_throughput": _rate(came.num_requests, duration),
        "output_throughput": _rate(came.num_output_tokens, duration),
        "total_token_throughput": _rate(came.num_prompt_tokens + came.num_output_tokens, duration),
        "steady_output_throughput": None,
        "max_concurrent_requests": most_at_once(records),
        **latency_metrics("ttft", [record.ttft for record in completed], num_failed),
        **latency_metrics("tpot", [tpot for tpot in tpots if tpot is not None], num_failed),
        **latency_metrics("itl", gaps, None),
        **latency_metrics("e2el", [record.e2el for record in completed], num_failed),
    }
    if steady and steady.end - steady.start >= MIN_STEADY_SHARE * duration:
        tokens = work_in(records, steady).num_output_tokens
        figures["steady_output_throughput"] = tokens / (steady.end - steady.start)
    if slo:
        figures["request_goodput"] = _rate(sum(record.meets(slo) for record in completed), duration)
    return figures


class Work(NamedTuple):
    """What a server has done in some time."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int


def work_in(records: list[RequestRecord], window: Window) -> Work:
    """Of completed requests: how many ended in the window, the prompts whose first token and the tokens that came."""
    completed = [record for record in records if not record.error]
    return Work(
        sum(record.ended in window for record in completed),
        sum(record.num_prompt_tokens for record in completed if record.chunks[0][0] in window),
        sum(num_tokens for record in completed for moment, num_tokens in record.chunks if moment in window),
    )


def most_at_once(records: list[RequestRecord]) -> int:
    """The highest number of requests that were under way together."""
    changes = sorted([(record.ended, -1) for record in records] + [(record.sent, 1) for record in records])
    return max(itertools.accumulate(change for _, change in changes), default=0)


def latency_metrics(name: str, seconds: list[float], num_failed: int | None) -> dict[str, float | None]:
    """mean_, median_, std_ and percentiles in milliseconds; all None where nothing was measured.

    `num_failed` requests stand for infinite times in the adj_ percentiles, which are None where they fall among them; a
    figure that is not one value a request (num_failed None) has none.
    """
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    has = len(values) > 0
    figures = {
        f"mean_{name}_ms": float(values.mean()) if has else None,
        f"median_{name}_ms": float(np.median(values)) if has else None,
        f"std_{name}_ms": float(values.std()) if has else None,
        **{f"p{p}_{name}_ms": float(np.percentile(values, p)) if has else None for p in PERCENTILES},
    }
    if num_failed is not None:
        figures |= {f"adj_p{p}_{name}_ms": _with_failures(values, num_failed, p) for p in PERCENTILES}
    return figures


def _with_failures(values: np.ndarray, num_failed: int, percentile: float) -> float | None:
    if not num_failed:
        return float(np.percentile(values, percentile)) if len(values) else None
    rank = math.ceil((len(values) + num_failed) * percentile / 100)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else None


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0
