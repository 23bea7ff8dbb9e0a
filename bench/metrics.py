"""What the figures mean, and the arithmetic from time stamps to figures.

Every figure that is printed is defined in `DEFINITIONS`, and is a pure function of the records of the requests. Tokens
are counted by the server's tokenizer, never by the number of chunks.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)

DEFINITIONS = {
    "TTFT": "request sent → first content token",
    "TPOT": "(E2EL - TTFT) / (output tokens - 1), of each request; undefined for one token",
    "ITL": "every gap between two tokens, pooled over all requests; a chunk of k tokens counts as k gaps",
    "E2EL": "request sent → last token",
    "adj_p99": "the percentile with every failed request counted as infinitely late",
    "throughput": "of completed requests, per second from the first request sent to the last one ended",
    "KV waste": "token slots in allocated KV blocks that hold no token, as a share of the allocated ones",
    "client lag": "how much later than due the load client's event loop woke up (beyond its timer's 1 ms), p99",
}


@dataclass
class RequestRecord:
    """One request as the client saw it. Times are seconds of one clock."""

    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)  # time and number of tokens of each arrival
    ended: float = 0.0
    num_prompt_tokens: int = 0
    error: str = ""  # empty: it completed

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
        gaps = [0.0] * (self.chunks[0][1] - 1)  # they came with the first token
        for (before, _), (now, num_tokens) in zip(self.chunks, self.chunks[1:], strict=False):
            gaps += [(now - before) / num_tokens] * num_tokens
        return gaps


def serving_metrics(records: list[RequestRecord]) -> dict[str, Any]:
    """The figures of a run, with the keys that `vllm bench serve` writes where the meaning is the same."""
    completed = [record for record in records if not record.error]
    num_failed = len(records) - len(completed)
    duration = max((r.ended for r in records), default=0.0) - min((r.sent for r in records), default=0.0)
    num_input = sum(record.num_prompt_tokens for record in completed)
    num_output = sum(record.num_output_tokens for record in completed)
    tpots = [record.tpot for record in completed]
    return {
        "duration": duration,
        "completed": len(completed),
        "failed": num_failed,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": _rate(len(completed), duration),
        "output_throughput": _rate(num_output, duration),
        "total_token_throughput": _rate(num_input + num_output, duration),
        **latency_metrics("ttft", [record.ttft for record in completed], num_failed),
        **latency_metrics("tpot", [tpot for tpot in tpots if tpot is not None], num_failed),
        **latency_metrics("itl", [gap for record in completed for gap in record.gaps], None),
        **latency_metrics("e2el", [record.e2el for record in completed], num_failed),
    }


def latency_metrics(name: str, seconds: list[float], num_failed: int | None) -> dict[str, float | None]:
    """mean_, median_, std_ and percentiles in milliseconds; all None where nothing was measured.

    `num_failed` requests stand for infinite times in adj_p99, which is None when it falls among them; a figure that is
    not one value a request (num_failed None) has none.
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
        figures[f"adj_p99_{name}_ms"] = _with_failures(values, num_failed, 99)
    return figures


def _with_failures(values: np.ndarray, num_failed: int, percentile: float) -> float | None:
    if not num_failed:
        return float(np.percentile(values, percentile)) if len(values) else None
    rank = math.ceil((len(values) + num_failed) * percentile / 100)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else None


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0
