"""One step's work: `ScheduledBatch` says it in plain numbers and travels, `ForwardBatch` holds it as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


class NewRow(msgspec.Struct, array_like=True):
    """A request that takes a row: what the device must know about it for as long as it runs."""

    row: int
    params: SamplingParams
    token_ids: Sequence[int]  # all tokens so far (prompt, and output after a preemption)
    num_prompt_tokens: int
    block_ids: list[int]  # blocks it already owns (prefix hits and those of its first chunk)
    stop_token_ids: list[int]  # tokens that min_tokens forbids for a while


class ScheduledRequest(msgspec.Struct, array_like=True):
    """What one running request gets in one step: tokens [start, start + num_tokens) of its sequence."""

    row: int
    start: int  # its num_computed_tokens before the step
    num_tokens: int
    samples: bool  # the last of these tokens is its newest: a token is drawn
    block_ids: list[int]  # blocks it gained for this step, appended to its table
    is_decode: bool = False  # one token, and all before it cached by earlier steps
    is_cached: bool = False  # a decode whose own token is cached, too: others may own its block, and nothing is stored


class ScheduledBatch(msgspec.Struct, array_like=True):
    """One step's work in plain numbers. Decodes come first, then prefill chunks.

    A token that the host does not know yet (it was drawn in a step still in flight) needs no value here: the row keeps
    its own tokens on the device.
    """

    new_rows: list[NewRow]
    requests: list[ScheduledRequest]
    # Copies from block to block: to the host ahead of the step, then to the device beside it (host_tier.py).
    paged_out: list[tuple[int, int]] = []
    paged_in: list[tuple[int, int]] = []

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.requests)

    @property
    def num_decodes(self) -> int:
        return sum(request.is_decode for request in self.requests)


@dataclass
class ForwardBatch:
    """One step's work on the device. T tokens of R requests, those of a request side by side; all int32."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] block_id * block_size + offset: where each token's key and value go
    query_start: Tensor  # [R + 1] the tokens of request i are query_start[i]:query_start[i + 1]
    context_lens: Tensor  # [R] tokens of the request in the cache after this step
    rows: Tensor  # [R] its line in block_table
    block_table: Tensor  # [max_num_seqs, max_blocks] block ids, in order
    num_decodes: int  # the first so many requests have one token each, all before it was cached by earlier steps
    max_query_len: int
    max_context_len: int
    wanted: Tensor | None = None  # [S] the tokens whose last hidden states are wanted; None: all T of them
