"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, one draw, log probabilities.

A token depends on its request's logits, parameters, seed and position only, never on who shares the batch: the draw is
argmax(logits + Gumbel noise), the noise a function of (seed, position).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import ops
from engine.sampling_params import SamplingParams


@dataclass
class SamplingRow:
    """What the sampler must know of one running request."""

    params: SamplingParams
    num_prompt_tokens: int
    seed: int
    bias_ids: Tensor | None = None  # [k] int64 tokens that logit_bias moves
    bias_values: Tensor | None = None  # [k] float32
    stop_ids: Tensor | None = None  # [k] int64 tokens that min_tokens forbids for a while

    @property
    def changes_logits(self) -> bool:
        return self.bias_ids is not None or self.stop_ids is not None or self.params.has_penalties

    @property
    def takes_best(self) -> bool:
        """It takes the most likely token of the logits as they are."""
        return self.params.is_greedy and not self.changes_logits


@dataclass
class Logprobs:
    """Log probabilities of n tokens and of the best k of their positions, before any parameter changed them."""

    chosen: Tensor  # [n] float32
    rank: Tensor  # [n] 1 is the most likely
    top_values: Tensor  # [n, k] float32
    top_ids: Tensor  # [n, k]


def make_row(params: SamplingParams, num_prompt_tokens: int, stop_ids: list[int], device: torch.device) -> SamplingRow:
    """Everything that can be prepared once a request."""
    bias = params.logit_bias or {}
    return SamplingRow(
        params=params,
        num_prompt_tokens=num_prompt_tokens,
        seed=params.seed or 0,
        bias_ids=torch.tensor(list(bias), device=device) if bias else None,
        bias_values=torch.tensor(list(bias.values()), dtype=torch.float32, device=device) if bias else None,
        stop_ids=torch.tensor(stop_ids, device=device) if params.min_tokens and stop_ids else None,
    )


def sample(logits: Tensor, rows: list[SamplingRow], histories: list[Tensor], positions: list[int]) -> Tensor:
    """Draw one token a row.   logits [n, vocab] float32 (changed in place), result [n] int64

    histories[i] [positions[i]] holds the row's tokens so far, on the logits' device; positions[i] is the index in its
    sequence of the token to draw.
    """
    for i, row in enumerate(rows):
        if row.changes_logits:
            _change_logits(logits[i], row, histories[i])
    random_rows = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if not random_rows:
        return logits.argmax(-1)
    if len(random_rows) == len(rows):
        return _draw(logits, rows, positions)
    drawn = logits.argmax(-1)
    index = torch.tensor(random_rows, device=logits.device)
    drawn[index] = _draw(logits[index], [rows[i] for i in random_rows], [positions[i] for i in random_rows])
    return drawn


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """Log probabilities of the given tokens and of the num_top best.   logits [n, vocab] float32, token_ids [n]"""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids.long().unsqueeze(-1))
    top_values, top_ids = logprobs.topk(num_top, dim=-1)
    return Logprobs(chosen.squeeze(-1), (logprobs > chosen).sum(-1) + 1, top_values, top_ids)


def _change_logits(logits: Tensor, row: SamplingRow, history: Tensor) -> None:
    """Apply logit_bias, min_tokens and the penalties of one row, in place.   logits [vocab], history [num_tokens]"""
    params = row.params
    if row.bias_ids is not None and row.bias_values is not None:
        logits[row.bias_ids] += row.bias_values
    num_outputs = len(history) - row.num_prompt_tokens
    if row.stop_ids is not None and num_outputs < params.min_tokens:
        logits[row.stop_ids] = -torch.inf
    if params.repetition_penalty != 1.0:
        seen = history.long().unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(history[row.num_prompt_tokens :].long(), minlength=len(logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _draw(logits: Tensor, rows: list[SamplingRow], positions: list[int]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(-1)

    logits = logits / column([row.params.temperature for row in rows])
    if any(row.params.min_p for row in rows):
        floor = logits.amax(-1, keepdim=True) + column([row.params.min_p for row in rows]).log()
        logits = logits.masked_fill(logits < floor, -torch.inf)
    vocab_size = logits.shape[-1]
    top_k = [row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size for row in rows]
    if min(top_k) < vocab_size:
        logits = _keep_top_k(logits, top_k)
    if any(row.params.top_p < 1 for row in rows):
        logits = _keep_top_p(logits, column([row.params.top_p for row in rows]))
    seeds = torch.tensor([row.seed for row in rows], dtype=torch.int64, device=logits.device)
    noise = ops.gumbel_noise(seeds, torch.tensor(positions, device=logits.device), vocab_size)
    return (logits + noise).argmax(-1)


def _keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    """Mask all but the k best of each row; what equals the k-th best stays too."""
    limited = [k for k in top_k if k < logits.shape[-1]]
    values = logits.topk(max(limited), dim=-1).values
    last = torch.tensor([min(k, max(limited)) - 1 for k in top_k], device=logits.device).unsqueeze(-1)
    is_unlimited = torch.tensor([k == logits.shape[-1] for k in top_k], device=logits.device).unsqueeze(-1)
    return logits.masked_fill((logits < values.gather(-1, last)) & ~is_unlimited, -torch.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Mask all but the smallest set of best tokens whose probabilities sum to top_p at least.   top_p [n, 1]

    No sort: the set is all tokens not less likely than some threshold, found by bisection over the bit patterns of
    the probabilities, which for positive floats order like the numbers. 31 halvings reach the exact threshold.
    """
    probabilities = logits.softmax(-1)
    bits = probabilities.view(torch.int32)
    low = torch.zeros_like(top_p, dtype=torch.int32)  # the mass at or above `low` is enough, at or above `high` not
    high = bits.amax(-1, keepdim=True) + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        mass = probabilities.masked_fill(bits < middle, 0.0).sum(-1, keepdim=True)
        is_enough = mass >= top_p
        low, high = torch.where(is_enough, middle, low), torch.where(is_enough, high, middle)
    return logits.masked_fill((bits < low) & (top_p < 1), -torch.inf)
