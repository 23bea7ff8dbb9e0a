"""Requests that may have ended engines, and those that have.

An engine that ends by itself, or hangs, accuses the requests that it was running. One that was accused twice is tried:
it runs alone in the next engine, for as long as it last lived in one and TRIAL_TOKENS more, and then with the others
again. What always holds: a request fails here only when the engine ended while that request ran alone.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterable

import msgspec

from engine.errors import RequestFailedError
from engine.messages import AddRequest, encode
from engine.outputs import RequestState
from engine.sampling_params import SamplingParams

NUM_CRASHES = 2  # at which a request must have been running to be tried
TRIAL_TOKENS = 16  # for each of its sequences
REFUSED_S = 600.0
DEFAULTS = SamplingParams()


class QuarantinedError(RequestFailedError):
    """This request ended the engine when it ran alone, or is the same as one that did."""

    code = "quarantined"


class Quarantine:
    """Owns the trials of accused requests, and the names of the convicted ones."""

    def __init__(self) -> None:
        self.on_trial: RequestState | None = None  # the one request that is in the engine
        self.is_between = False  # two trials: the engine has not said yet that it has nothing
        self.num_convicted = 0
        self._accused: deque[RequestState] = deque()  # to be tried after it
        self._refused: dict[str, float] = {}  # reference of a request: time.monotonic() until which it is refused

    def accuse(self, running: Iterable[RequestState]) -> None:
        """Note that an engine ended with these."""
        for state in running:
            state.num_crashes += 1

    def begin(self, unfinished: Iterable[RequestState]) -> None:
        """Choose whom to try in a new engine, and the first of them."""
        self._accused = deque(state for state in unfinished if state.num_crashes >= NUM_CRASHES)
        for state in self._accused:
            lived = state.timings.num_output_tokens - state.num_tokens_at_start
            state.num_trial_tokens = state.timings.num_output_tokens + lived + TRIAL_TOKENS * len(state.sequences)
        self.on_trial, self.is_between = self._accused.popleft() if self._accused else None, False

    @property
    def is_trying(self) -> bool:
        """Others than the one on trial have to wait."""
        return self.on_trial is not None or self.is_between

    @property
    def is_passed(self) -> bool:
        """The request on trial has given all the tokens that it had to, or its last one."""
        state = self.on_trial
        return state is not None and (state.is_finished or state.timings.num_output_tokens >= state.num_trial_tokens)

    def acquit(self) -> None:
        """End a trial. Until the engine has got rid of the request, its end would be nobody else's."""
        if self.on_trial is not None:
            self.on_trial.num_crashes = 0
        self.on_trial, self.is_between = None, bool(self._accused)

    def try_next(self, unfinished: set[RequestState]) -> None:
        """Put the next one of those that still run on trial, if there is one."""
        self._accused = deque(state for state in self._accused if state in unfinished)
        self.on_trial, self.is_between = self._accused.popleft() if self._accused else None, False

    def convict(self, reason: str) -> QuarantinedError:
        """The request on trial has ended the engine; the error for it and for its equals."""
        assert self.on_trial is not None
        now = time.monotonic()
        reference = reference_of(self.on_trial.sequences[0].request)
        self._refused = {name: until for name, until in self._refused.items() if until > now}
        self._refused[reference] = now + REFUSED_S
        self.num_convicted += 1
        return QuarantinedError(
            f"this request ended the engine, and did it again when it ran alone ({reason}); the log has its size and "
            f"parameters, under the reference {reference}"
        )

    def is_refused(self, request: AddRequest) -> bool:
        """It is the same as one that ended the engine a while ago."""
        return bool(self._refused) and self._refused.get(reference_of(request), 0.0) > time.monotonic()

    def check(self, request: AddRequest) -> None:
        """Raises QuarantinedError for a request that is the same as one that ended the engine a while ago."""
        if self.is_refused(request):
            raise QuarantinedError(
                "a request like this one ended the engine when it ran alone, and is refused for "
                f"{REFUSED_S / 60:.0f} minutes; the log has more under the reference {reference_of(request)}"
            )


def describe(state: RequestState) -> str:
    """A request for the log: its sizes and parameters that are numbers, and nothing that its client wrote."""
    request = state.sequences[0].request
    numbers = {
        name: value
        for name, value in msgspec.structs.asdict(request.params).items()
        if isinstance(value, int | float) and value != getattr(DEFAULTS, name)
    }
    return (
        f"{state.request_id} (reference {reference_of(request)}: {state.timings.num_prompt_tokens:,} prompt tokens, "
        f"{len(state.sequences)} sequences with {state.timings.num_output_tokens:,} tokens given, {numbers})"
    )


def reference_of(request: AddRequest) -> str:
    """The same for two requests that ask the same of the engine, whatever their names and seeds."""
    params = msgspec.structs.replace(request.params, seed=None)
    return hashlib.sha256(encode([request.prompt_token_ids, params, request.cache_salt])).hexdigest()[:12]
