"""How much a tenant may ask for: requests and tokens a minute, and requests open at once.

What always holds: over any stretch of time a tenant is let in for no more than its rate allows, but for one minute's
worth that it may save up, and for what the requests that were open generate after the rate is used up. Nothing is
guessed: tokens are taken as they are known (of a prompt at once, of an answer at its end), into debt if need be, and
a tenant in debt waits until it is paid.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vcli.server.protocol import ApiError

REASON = "rate_limit"
RETRY_SOON_S = 1


class Bucket:
    """A rate, as a balance that grows by so much a minute, up to one minute's worth."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._balance = float(per_minute)
        self._since = time.monotonic()

    def wait_s(self) -> float:
        """How long until there is something to take; 0 when there is."""
        return max(0.0, (1 - self._now()) * 60 / self.per_minute)

    def take(self, amount: int) -> None:
        self._balance = self._now() - amount

    def _now(self) -> float:
        now = time.monotonic()
        self._balance = min(self.per_minute, self._balance + (now - self._since) * self.per_minute / 60)
        self._since = now
        return self._balance


@dataclass(frozen=True)
class Limits:
    """What one tenant may ask for. None is no limit; a request that asks for n answers counts as n."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_open_requests: int | None = None


Reject = Callable[[str, int, str, int], ApiError]  # counts a refusal: its reason, status, message and seconds to wait


class Budget:
    """What one tenant has left of its limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_open = 0
        self._requests = Bucket(limits.requests_per_minute) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute) if limits.tokens_per_minute else None

    @contextmanager
    def enter(self, num_sequences: int, reject: Reject) -> Iterator[None]:
        """Count the sequences of one call while they are open. Raises ApiError when the tenant has to wait."""
        self._check_open(num_sequences, reject)
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s()):
                message = f"this key has used up its {bucket.per_minute:,} {what} a minute: wait {wait_s:.1f} s"
                raise reject(REASON, 429, message, math.ceil(wait_s))
        if self._requests is not None:
            self._requests.take(num_sequences)
        self.num_open += num_sequences
        try:
            yield
        finally:
            self.num_open -= num_sequences

    def spend(self, num_tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def _check_open(self, num_sequences: int, reject: Reject) -> None:
        limit = self.limits.max_open_requests
        if limit is None or self.num_open + num_sequences <= limit:
            return
        if num_sequences > limit:
            raise ApiError(400, f"the request asks for {num_sequences:,} answers, and this key may have {limit:,} open")
        message = f"this key has {self.num_open:,} open requests and may have {limit:,}: wait for one of them to end"
        raise reject(REASON, 429, message, RETRY_SOON_S)
