"""One step on the device: rows become a ForwardBatch, hidden states, logits, tokens.

Each running request owns a row of two tables that stay on the device: its token ids and its block ids. A step uploads
only plain numbers that say which part of which row it computes; a drawn token goes straight into its row, so the next
step can be launched before the host has seen it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine import sampler
from engine.batch import ForwardBatch, NewRow, ScheduledBatch, ScheduledRequest
from engine.config import BLOCK_SIZE
from engine.cuda_graphs import DecodeGraphs, graph_sizes
from engine.messages import TokenLogprob
from engine.models import Model
from engine.sampler import Logprobs, SamplingRow


@dataclass
class Row:
    """What the host keeps of a running request."""

    sampling: SamplingRow
    num_tokens: int  # when it got the row
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # chunk by chunk


@dataclass
class StepResult:
    """What a step drew, on its way from the device."""

    token_ids: Tensor  # [S]
    logprobs: Logprobs | None
    num_top: list[int | None]  # alternatives each of the S requests wants; None: no log probabilities
    prompt_logprobs: dict[int, list[Logprobs]]  # by place among the S requests whose prompt is now complete
    prompts: dict[int, tuple[Tensor, int]]  # the same: prompt token ids, alternatives wanted
    event: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], dict[int, TokenLogprob], dict[int, list[TokenLogprob | None]]]:
        """Tokens, log probabilities and prompt log probabilities, as Scheduler.update takes them."""
        if self.event is not None:
            self.event.synchronize()
        token_ids = self.token_ids.tolist()
        logprobs = {}
        if self.logprobs is not None:
            rows = _to_messages(token_ids, self.logprobs, [num or 0 for num in self.num_top])
            logprobs = {i: row for i, row in enumerate(rows) if self.num_top[i] is not None}
        return token_ids, logprobs, {i: self._prompt_rows(i) for i in self.prompt_logprobs}

    def _prompt_rows(self, i: int) -> list[TokenLogprob | None]:
        prompt, num_top = self.prompts[i]
        following = prompt.tolist()[1:]
        rows: list[TokenLogprob | None] = [None]  # nothing predicts the first token
        for chunk in self.prompt_logprobs[i]:
            start = len(rows) - 1
            token_ids = following[start : start + len(chunk.chosen)]
            rows += _to_messages(token_ids, chunk, [num_top] * len(token_ids))
        return rows


class ModelRunner:
    """Owns the tables of the running requests and runs the model over batches of them."""

    def __init__(
        self, model: Model, device: torch.device, max_num_seqs: int, max_model_len: int, padding_block: int
    ) -> None:
        """padding_block: a block of the cache that no request owns, for the rows that fill up a graph."""
        self.model = model
        self.device = device
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_blocks = -(-max_model_len // BLOCK_SIZE)
        # The last line of both tables belongs to the padding.
        self.token_ids = torch.zeros(max_num_seqs + 1, max_model_len, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(max_num_seqs + 1, self.max_blocks, dtype=torch.int32, device=device)
        self.block_table[max_num_seqs, 0] = padding_block
        self.query_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.rows: dict[int, Row] = {}
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Record decode steps, so that each is one launch from now on."""
        nothing = ScheduledRequest(row=self.max_num_seqs, start=0, num_tokens=1, samples=True, block_ids=[])
        padding = self._decode_fields([nothing])
        self.graphs = DecodeGraphs(self._decode, padding, graph_sizes(self.max_num_seqs), self.device)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Launch one step. Later steps may be launched before its result is waited for."""
        for new in batch.new_rows:
            self._set_row(new)
        if all(self._is_decode(request) for request in batch.requests):
            fields = self._decode_fields(batch.requests)
            logits, best = self.graphs.run(fields) if self.graphs else self._decode(self._upload(fields))
            return self._draw(batch.requests, logits, best, {})
        self._extend_block_table(batch)
        sampled = [request for request in batch.requests if request.samples]
        forward_batch, sample_index = self._prepare(batch)
        hidden = self.model.forward(forward_batch)
        complete = self._compute_prompt_logprobs(batch, hidden)
        logits = self.model.logits(hidden.index_select(0, sample_index))
        return self._draw(sampled, logits, None, complete)

    def _is_decode(self, request: ScheduledRequest) -> bool:
        """One token in, one token out, and nothing to be said about the prompt."""
        sampling = self.rows[request.row].sampling
        wants_prompt = sampling.params.prompt_logprobs is not None and request.start < sampling.num_prompt_tokens
        return request.num_tokens == 1 and request.samples and not wants_prompt

    def _decode_fields(self, requests: list[ScheduledRequest]) -> np.ndarray:
        """What `_decode` needs of each request, [7, R] int32."""
        width = self.token_ids.shape[1]
        columns = [
            (
                r.start,
                r.row * width + r.start,
                r.row * width + min(r.start + 1, width - 1),
                r.row * self.max_blocks + r.start // BLOCK_SIZE,
                r.block_ids[0] if r.block_ids else -1,
                r.start + 1,
                r.row,
            )
            for r in requests
        ]
        return np.ascontiguousarray(np.array(columns, dtype=np.int32).T)

    def _decode(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each of R requests: logits [R, vocab], and the best token [R], which is put into its row.

        Made of device work alone, on tensors whose shapes depend on R only: it can be captured.
        """
        positions, token_index, next_index, table_index, new_blocks, contexts, rows = fields.unbind(0)
        table, token_ids = self.block_table.view(-1), self.token_ids.view(-1)
        table_index = table_index.long()
        blocks = torch.where(new_blocks >= 0, new_blocks, table.index_select(0, table_index))
        table.index_copy_(0, table_index, blocks)
        forward_batch = ForwardBatch(
            token_ids=token_ids.index_select(0, token_index),
            positions=positions,
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_start=self.query_starts[: len(positions) + 1],
            context_lens=contexts,
            rows=rows,
            block_table=self.block_table,
            num_decodes=len(positions),
            max_query_len=1,
            max_context_len=self.max_model_len,
        )
        logits = self.model.logits(self.model.forward(forward_batch))
        best = logits.argmax(-1)
        token_ids.index_copy_(0, next_index.long(), best.int())
        return logits, best

    def _set_row(self, new: NewRow) -> None:
        self.rows[new.row] = Row(
            sampler.make_row(new.params, new.num_prompt_tokens, new.stop_token_ids, self.device), len(new.token_ids)
        )
        self.token_ids[new.row, : len(new.token_ids)] = self._upload(new.token_ids)
        self.block_table[new.row, : len(new.block_ids)] = self._upload(new.block_ids)

    def _extend_block_table(self, batch: ScheduledBatch) -> None:
        growing = [request for request in batch.requests if request.block_ids]
        if not growing:
            return
        places: list[int] = []
        block_ids: list[int] = []
        for request in growing:
            last = (request.start + request.num_tokens - 1) // BLOCK_SIZE
            first = request.row * self.max_blocks + last + 1 - len(request.block_ids)
            places += range(first, first + len(request.block_ids))
            block_ids += request.block_ids
        self.block_table.view(-1)[self._upload(places).long()] = self._upload(block_ids)

    def _prepare(self, batch: ScheduledBatch) -> tuple[ForwardBatch, Tensor]:
        """The batch's tensors, and which of its tokens are followed by a draw; one upload for all of them."""
        fields = [(request.row, request.start, request.num_tokens) for request in batch.requests]
        rows, starts, counts = np.array(fields, dtype=np.int32).T
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
        token_rows = np.repeat(rows, counts)
        samples = np.array([request.samples for request in batch.requests])
        parts = [
            positions,
            token_rows * self.token_ids.shape[1] + positions,
            token_rows * self.max_blocks + positions // BLOCK_SIZE,
            query_start,
            starts + counts,
            rows,
            query_start[1:][samples] - 1,
        ]
        uploaded = self._upload(np.concatenate(parts)).split([len(part) for part in parts])
        device_positions, token_index, table_index, starts_of_queries, contexts, device_rows, sample_index = uploaded
        blocks = self.block_table.view(-1).index_select(0, table_index)
        forward_batch = ForwardBatch(
            token_ids=self.token_ids.view(-1).index_select(0, token_index),
            positions=device_positions,
            slot_mapping=blocks * BLOCK_SIZE + device_positions % BLOCK_SIZE,
            query_start=starts_of_queries,
            context_lens=contexts,
            rows=device_rows,
            block_table=self.block_table,
            num_decodes=int((counts == 1).sum()),
            max_query_len=int(counts.max()),
            max_context_len=int((starts + counts).max()),
        )
        return forward_batch, sample_index

    def _draw(
        self,
        sampled: list[ScheduledRequest],
        logits: Tensor,
        best: Tensor | None,
        complete: dict[int, list[Logprobs]],
    ) -> StepResult:
        """Draw the batch's tokens, put them into their rows, and start their way to the host.

        best [S]: the most likely tokens, if they are known and lie in their rows already.
        """
        rows = [self.rows[request.row].sampling for request in sampled]
        num_top = [row.params.logprobs for row in rows]
        wants_logprobs = any(num is not None for num in num_top)
        raw_logits = logits.clone() if wants_logprobs and any(row.changes_logits for row in rows) else logits
        if best is not None and all(row.takes_best for row in rows):
            token_ids = best
        else:
            token_ids = self._sample(sampled, rows, logits)
        logprobs = None
        if wants_logprobs:
            logprobs = sampler.logprobs_of(raw_logits, token_ids, max(num or 0 for num in num_top))
        prompt_logprobs = {i: complete[request.row] for i, request in enumerate(sampled) if request.row in complete}
        prompts = {i: self._prompt_of(sampled[i].row) for i in prompt_logprobs}
        event = None
        if self.device.type == "cuda":
            token_ids = token_ids.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return StepResult(token_ids, logprobs, num_top, prompt_logprobs, prompts, event)

    def _sample(self, sampled: list[ScheduledRequest], rows: list[SamplingRow], logits: Tensor) -> Tensor:
        """Draw a token for each request, and put it into its row."""
        if not sampled:
            return logits.new_zeros(0, dtype=torch.int64)
        ends = [request.start + request.num_tokens for request in sampled]
        histories = [self.token_ids[request.row, :end] for request, end in zip(sampled, ends, strict=True)]
        token_ids = sampler.sample(logits, rows, histories, ends)
        width = self.token_ids.shape[1]
        # A token drawn at the very end of the context has no place in its row, and is never read from it.
        places = [request.row * width + min(end, width - 1) for request, end in zip(sampled, ends, strict=True)]
        self.token_ids.view(-1).index_copy_(0, self._upload(places).long(), token_ids.int())
        return token_ids

    def _prompt_of(self, row: int) -> tuple[Tensor, int]:
        sampling = self.rows[row].sampling
        return self.token_ids[row, : sampling.num_prompt_tokens].clone(), sampling.params.prompt_logprobs or 0

    def _compute_prompt_logprobs(self, batch: ScheduledBatch, hidden: Tensor) -> dict[int, list[Logprobs]]:
        """Extend the rows that asked for prompt log probabilities; those now complete, by row."""
        complete, offset = {}, 0
        for request in batch.requests:
            row, first = self.rows[request.row], offset
            offset += request.num_tokens
            num_top, num_prompt_tokens = row.sampling.params.prompt_logprobs, row.sampling.num_prompt_tokens
            if num_top is None or row.num_tokens > num_prompt_tokens or request.start >= num_prompt_tokens:
                continue  # not asked for, or already delivered before a preemption, or the prompt is done
            num_predicted = min(request.num_tokens, num_prompt_tokens - 1 - request.start)
            if num_predicted > 0:
                following = self.token_ids[request.row, request.start + 1 : request.start + 1 + num_predicted]
                logits = self.model.logits(hidden[first : first + num_predicted])
                row.prompt_logprobs.append(sampler.logprobs_of(logits, following, num_top))
            if request.start + request.num_tokens == num_prompt_tokens:
                complete[request.row] = row.prompt_logprobs
        return complete

    def _upload(self, values: list[int] | np.ndarray) -> Tensor:
        host = torch.from_numpy(np.asarray(values, dtype=np.int32))
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)


def _to_messages(token_ids: list[int], logprobs: Logprobs, num_top: list[int]) -> list[TokenLogprob]:
    values, ids = logprobs.top_values.tolist(), logprobs.top_ids.tolist()
    rows = zip(token_ids, logprobs.chosen.tolist(), logprobs.rank.tolist(), ids, values, num_top, strict=True)
    return [
        TokenLogprob(token_id, chosen, rank, list(zip(row_ids[:num], row_values[:num], strict=True)))
        for token_id, chosen, rank, row_ids, row_values, num in rows
    ]
