"""What a step has drawn, from its launch until the host knows it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.sampler import Logprobs
from engine.token_mask import TokenMask


@dataclass
class StepResult:
    """What a step drew, on its way from the device."""

    token_ids: Tensor  # [S]
    logprobs: Logprobs | None
    num_top: list[int | None]  # alternatives each of the S requests wants; None: no log probabilities
    prompt_logprobs: dict[int, list[Logprobs]]  # by place among the S requests whose prompt is now complete
    prompts: dict[int, tuple[Tensor, int]]  # the same: prompt token ids, alternatives wanted
    pooled: dict[int, Tensor]  # by place, of requests that pool the hidden states of their prompt: [hidden_size]
    event: torch.cuda.Event | None
    masks: dict[int, TokenMask] = field(default_factory=dict)  # by place among the S requests, of those that have one
    ended: dict[int, str] = field(default_factory=dict)  # of those, the ones that end here, with what they failed at
    _known: list[int] | None = None

    def take_in(self) -> list[int]:
        """The tokens, once they are there; they are taken by the masks, which the next step's need, the first time."""
        if self._known is None:
            if self.event is not None:
                self.event.synchronize()
            self._known = self.token_ids.tolist()
            for i, mask in self.masks.items():
                if self._known[i] >= 0:
                    mask.take(self._known[i])
            # Told now: what the next step's mask fails at is the next step's.
            self.ended = {i: mask.error for i, mask in self.masks.items() if mask.is_ended}
        return self._known

    def wait(
        self,
    ) -> tuple[
        list[int], dict[int, TokenLogprob], dict[int, list[TokenLogprob | None]], dict[int, bytes], dict[int, str]
    ]:
        """Tokens, log probabilities, those of prompts, embeddings and ended masks, as Scheduler.update takes them."""
        token_ids = list(self.take_in())
        vectors = {i: vector.cpu().numpy() for i, vector in self.pooled.items()}
        for i, vector in vectors.items():
            if not np.isfinite(vector).all():
                token_ids[i] = -1
        logprobs = {}
        if self.logprobs is not None:
            rows = _to_messages(token_ids, self.logprobs, [num or 0 for num in self.num_top])
            logprobs = {i: row for i, row in enumerate(rows) if self.num_top[i] is not None}
        prompt_logprobs = {i: self._prompt_rows(i) for i in self.prompt_logprobs}
        embeddings = {i: vector.tobytes() for i, vector in vectors.items()}
        return token_ids, logprobs, prompt_logprobs, embeddings, self.ended

    def _prompt_rows(self, i: int) -> list[TokenLogprob | None]:
        prompt, num_top = self.prompts[i]
        following = prompt.tolist()[1:]
        rows: list[TokenLogprob | None] = [None]  # nothing predicts the first token
        for chunk in self.prompt_logprobs[i]:
            start = len(rows) - 1
            token_ids = following[start : start + len(chunk.chosen)]
            rows += _to_messages(token_ids, chunk, [num_top] * len(token_ids))
        return rows


def _to_messages(token_ids: list[int], logprobs: Logprobs, num_top: list[int]) -> list[TokenLogprob]:
    values, ids = logprobs.top_values.tolist(), logprobs.top_ids.tolist()
    rows = zip(token_ids, logprobs.chosen.tolist(), logprobs.rank.tolist(), ids, values, num_top, strict=True)
    return [
        TokenLogprob(token_id, chosen, rank, list(zip(row_ids[:num], row_values[:num], strict=True)))
        for token_id, chosen, rank, row_ids, row_values, num in rows
    ]
