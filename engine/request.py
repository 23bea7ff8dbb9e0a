"""One sequence on its way from prompt to last token.

Prefill, decode, chunks, prefix hits and recomputation are one thing: a request owes the cache `num_tokens_due` tokens,
and each step pays some of them. Changed by Scheduler alone.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property

from engine.block_pool import PrefixHashes
from engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt, what was drawn after it, and where its keys and values lie."""

    request_id: str
    token_ids: array[int]  # int32: prompt, then every output token that the host knows
    prefix: PrefixHashes  # of the full blocks of token_ids, as far as they are worked out
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int  # output tokens at most, the model's context considered
    eos_token_ids: frozenset[int]
    order: tuple[int, int] = (0, 0)  # (priority, arrival number): smaller is served first and preempted last
    num_computed_tokens: int = 0  # tokens whose KV is in the cache, or will be after the steps in flight
    num_in_flight: int = 0  # tokens drawn by steps in flight: part of the sequence, value not known yet
    block_ids: list[int] = field(default_factory=list)
    num_registered_blocks: int = 0  # leading blocks that the prefix cache knows
    has_found_blocks: bool = False  # others computed some of its blocks
    computes_all: bool = False  # it takes no blocks of others any more
    num_void: int = 0  # of the tokens in flight, those that are drawn after one that was none
    row: int = -1  # its place in the device tables while it runs
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when it first ran
    scheduled_time: float = 0.0  # time.monotonic() of its first step
    grammar: object = None  # compiled: kept alive for as long as the request may get a row
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the sequence, tokens in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_tokens_due(self) -> int:
        """Tokens whose KV is still to be computed; none once the last token allowed has been drawn."""
        return self.num_tokens - self.num_computed_tokens if self.num_output_tokens < self.max_tokens else 0

    @property
    def needs_every_position(self) -> bool:
        """All of its prompt must pass through the model: it takes no blocks that others have computed."""
        return self.computes_all or self.params.asks_prompt

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end it: those the client named and, unless ignored, the model's end of sequence."""
        named = frozenset(self.params.stop_token_ids)
        return named if self.params.ignore_eos else named | self.eos_token_ids

    def is_stop(self, token_id: int) -> bool:
        """Whether a token stands for an end, and for no text."""
        return token_id in self.stop_token_ids or token_id in self.eos_token_ids

    def is_named_stop(self, token_id: int) -> bool:
        """Whether the client named a token, which is not the model's own end, as one that ends the sequence."""
        return token_id in self.params.stop_token_ids and token_id not in self.eos_token_ids

    def finish_reason_after(self, token_id: int) -> str | None:
        """Why the sequence ends with this token, its newest, or None if it goes on."""
        num_outputs = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self.stop_token_ids and num_outputs >= self.params.min_tokens:
            return "stop"
        return "length" if num_outputs >= self.max_tokens else None
