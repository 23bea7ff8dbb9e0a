"""One step on the device: rows become a ForwardBatch, hidden states, logits, tokens.

Each running request owns a row of tables that stay on the device: its token ids, block ids and sampling parameters. A
step uploads only plain numbers that say which part of which row it computes; a drawn token goes straight into its row,
so the next step can be launched before the host has seen it.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine import ops, sampler
from engine.batch import ForwardBatch, NewRow, ScheduledBatch, ScheduledRequest
from engine.config import BLOCK_SIZE
from engine.cuda_graphs import Graphs, decode_sizes, mixed_sizes
from engine.grammar_compiler import GrammarCompiler
from engine.models import Model
from engine.ops import sampling_line
from engine.sampler import Logprobs, SamplingRow
from engine.sampling_params import SamplingParams
from engine.step_clock import StepClock
from engine.step_result import StepResult
from engine.token_mask import TokenMask, num_words

REAL_PACE = 0.8  # beside rows that do nothing: Llama 3.1 8B computes 44,300 tokens/s on an H200, and 54,400 of those
MAX_GRAPH_CONTEXT = 16_384  # of a decode in a mixed graph: not all prefill kernels split it over multiprocessors


@dataclass
class Row:
    """What the host keeps of a running request."""

    sampling: SamplingRow
    num_tokens: int  # when it got the row
    mask: TokenMask | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # chunk by chunk
    hidden_sum: Tensor | float = 0.0  # [hidden_size] float32: over the prompt tokens so far, where it wants their mean
    has_line: bool = False  # in sampling_lines: it gets there when it is first needed, behind the launch of the model


class ModelRunner:
    """Owns the tables of the running requests and runs the model over batches of them."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        max_num_seqs: int,
        max_model_len: int,
        padding_block: int,
        clock: StepClock,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """padding_block: a block of the cache that no request owns, for the rows that fill up a graph.

        grammars: where those of the requests are found.
        """
        self.model = model
        self.device = device
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_blocks = -(-max_model_len // BLOCK_SIZE)
        # The last line of all tables belongs to the padding.
        self.token_ids = torch.zeros(max_num_seqs + 1, max_model_len, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(max_num_seqs + 1, self.max_blocks, dtype=torch.int32, device=device)
        self.block_table[max_num_seqs, 0] = padding_block
        self.sampling_lines = torch.zeros(max_num_seqs + 1, sampling_line.NUM_WORDS, dtype=torch.int32, device=device)
        self.query_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.rows: dict[int, Row] = {}
        self.grammars = grammars
        self.last_masked: StepResult | None = None  # the newest step, if masks must follow what it draws
        self.decode_graphs: Graphs | None = None
        self.mixed_graphs: Graphs | None = None

    @torch.inference_mode()
    def capture_graphs(self, max_num_tokens: int) -> tuple[float, float]:
        """Record decode steps and small mixed ones of common sizes, so that each is one launch from now on.

        Returns what a large mixed step takes in seconds, whatever is in it, and for each token of prompts.
        """

        def mixed(inputs: Tensor, size: int) -> Tensor:
            num_requests = self._max_num_requests(size)
            return self._forward_mixed(inputs, size, num_requests, num_requests, 0, size, self.max_model_len)

        def idle(size: int) -> np.ndarray:
            return self._mixed_inputs([], size, self._max_num_requests(size))

        def run(size: int) -> None:
            mixed(self._upload(idle(size)), size)

        sizes = mixed_sizes(max_num_tokens, run)
        self.mixed_graphs = Graphs(mixed, idle, sizes, self.device, full_size=max_num_tokens)
        sizes, idle_decodes = decode_sizes(self.max_num_seqs), partial(self._decode_inputs, [])
        self.decode_graphs = Graphs(self._decode, idle_decodes, sizes, self.device, shared=self.mixed_graphs)
        fixed_s, per_token_s = self.mixed_graphs.pace()
        return fixed_s, per_token_s / REAL_PACE

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Record one more size: a wanted one, or else of the kind of steps of which more wait. False if none does."""
        order = sorted(self.graphs, key=lambda graphs: (graphs.wanted is None, -len(graphs.waiting)))
        return bool(order) and order[0].capture_next()

    @property
    def wants_graph(self) -> bool:
        """Whether steps would have had less padding with a size that waits."""
        return any(graphs.wanted is not None for graphs in self.graphs)

    @property
    def graphs(self) -> list[Graphs]:
        return [graphs for graphs in (self.mixed_graphs, self.decode_graphs) if graphs is not None]

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Launch one step. Later steps may be launched before its result is waited for."""
        self.clock.enter("prepare")
        for new in batch.new_rows:
            self._set_row(new)
        requests = batch.requests
        are_decodes = batch.num_decodes == len(requests) and all(request.samples for request in requests)
        if are_decodes and not any(params.asks_prompt or params.pooling for params in self._params_of_prompts(batch)):
            logits, best = self._run_decodes(requests)
            return self._draw(requests, logits, best, {}, {})
        sampled = [request for request in requests if request.samples]
        hidden, complete = self._run_mixed(batch, len(sampled))
        logits = self.model.logits(hidden)[: len(sampled)]
        return self._draw(sampled, logits, None, complete, self._pooled(sampled, hidden))

    def _run_decodes(self, requests: list[ScheduledRequest]) -> tuple[Tensor, Tensor]:
        """One token in, one token out: logits [R, vocab], and the best tokens [R]."""
        if self.decode_graphs is None:
            return self._decode(self._upload(self._decode_inputs(requests, len(requests))), len(requests))
        size = self.decode_graphs.fit(len(requests))
        assert size is not None, len(requests)
        inputs = self._decode_inputs(requests, size)
        self.clock.enter("forward")
        logits, best = self.decode_graphs.run(inputs, size)
        return logits[: len(requests)], best[: len(requests)]

    def _run_mixed(self, batch: ScheduledBatch, num_sampled: int) -> tuple[Tensor, dict[int, list[Logprobs]]]:
        """Hidden states [S, hidden_size] to draw from, and the prompt log probabilities now complete.

        S is num_sampled or more: cuBLAS takes long to choose a kernel for a number of rows that it has not seen, as in
        logits of these.
        """
        requests, num_tokens = batch.requests, batch.num_tokens
        longest_decode = max((request.start + 1 for request in requests if request.num_tokens == 1), default=0)
        size = self.mixed_graphs.fit(num_tokens) if self.mixed_graphs else None
        if any(params.asks_prompt for params in self._params_of_prompts(batch)):
            hidden = self._forward_mixed(*self._exact_inputs(batch, None))
            complete = self._compute_prompt_logprobs(batch, hidden)
            self._add_hidden(batch, hidden)
            last = np.cumsum([request.num_tokens for request in requests])[[r.samples for r in requests]] - 1
            return hidden.index_select(0, self._upload(last)), complete
        if self.mixed_graphs is None or size is None or longest_decode > MAX_GRAPH_CONTEXT:
            return self._forward_mixed(*self._exact_inputs(batch, num_sampled)), {}
        inputs = self._mixed_inputs(requests, size, self._max_num_requests(size))
        self.clock.enter("forward")
        num_rows = self.decode_graphs.fit(num_sampled) if self.decode_graphs else num_sampled
        return self.mixed_graphs.run(inputs, size)[:num_rows], {}

    def _params_of_prompts(self, batch: ScheduledBatch) -> list[SamplingParams]:
        """Of the requests of whose prompts this step computes something."""
        rows = [(request.start, self.rows[request.row].sampling) for request in batch.requests]
        return [sampling.params for start, sampling in rows if start < sampling.num_prompt_tokens]

    def _add_hidden(self, batch: ScheduledBatch, hidden: Tensor) -> None:
        """Extend the sums of the rows that want a mean.   hidden [T, hidden_size]"""
        first = 0
        for request in batch.requests:
            row, end = self.rows[request.row], first + request.num_tokens
            if row.sampling.params.pooling == "mean":
                row.hidden_sum = row.hidden_sum + hidden[first:end].sum(0, dtype=torch.float32)
            first = end

    def _pooled(self, sampled: list[ScheduledRequest], hidden: Tensor) -> dict[int, Tensor]:
        """The vectors [hidden_size] float32 of the prompts that are complete.   hidden [S, hidden_size]"""
        pooled = {}
        for i, request in enumerate(sampled):
            row = self.rows[request.row]
            if row.sampling.params.pooling == "last":
                pooled[i] = hidden[i].to(torch.float32, copy=True)  # a graph's output is overwritten by the next step
            elif row.sampling.params.pooling == "mean":
                pooled[i] = torch.as_tensor(row.hidden_sum) / row.sampling.num_prompt_tokens
        return pooled

    def _max_num_requests(self, num_tokens: int) -> int:
        return min(num_tokens, self.max_num_seqs)

    def _decode_inputs(self, requests: list[ScheduledRequest], size: int) -> np.ndarray:
        """What `_decode` needs of each request, [6, size] int32, the rest filled up with rows that do nothing.

        A token that is cached is stored where those of such rows are.
        """
        idle = self.max_num_seqs
        # In plain Python: that is no slower than numpy for 256 requests, and three times as fast for one.
        fields = [
            (
                r.start,
                r.row * self.max_model_len + r.start,
                idle * self.max_blocks if r.is_cached else r.row * self.max_blocks + r.start // BLOCK_SIZE,
                r.block_ids[0] if r.block_ids else -1,
                r.start + 1,
                r.row,
            )
            for r in requests
        ]
        fields += [(0, idle * self.max_model_len, idle * self.max_blocks, -1, 1, idle)] * (size - len(requests))
        return np.array(list(zip(*fields, strict=True)), dtype=np.int32)

    def _decode(self, inputs: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """One token of each of R requests: logits [R, vocab], and the best token [R], which is put into its row.

        Made of device work alone, on tensors whose shapes depend on R only: it can be captured.
        """
        self.clock.enter("forward")
        positions, token_index, table_index, new_blocks, contexts, rows = inputs.unbind(0)
        forward_batch = ForwardBatch(
            token_ids=self.token_ids.view(-1).index_select(0, token_index),
            positions=positions,
            slot_mapping=self._slots(positions, table_index, new_blocks),
            query_start=self.query_starts[: size + 1],
            context_lens=contexts,
            rows=rows,
            block_table=self.block_table,
            num_decodes=size,
            max_query_len=1,
            max_context_len=self.max_model_len,
        )
        logits = self.model.logits(self.model.forward(forward_batch))
        return logits, ops.take_best(logits, rows, contexts, self.token_ids)

    def _exact_inputs(
        self, batch: ScheduledBatch, num_wanted: int | None
    ) -> tuple[Tensor, int, int, int | None, int, int, int]:
        """The arguments of `_forward_mixed` for a batch as it is."""
        requests = batch.requests
        counts = [request.num_tokens for request in requests]
        inputs = self._upload(self._mixed_inputs(requests, sum(counts), len(requests)))
        longest = max(request.start + request.num_tokens for request in requests)
        return inputs, sum(counts), len(requests), num_wanted, batch.num_decodes, max(counts), longest

    def _mixed_inputs(self, requests: list[ScheduledRequest], num_tokens: int, num_requests: int) -> np.ndarray:
        """What `_forward_mixed` needs of each token and request, int32, filled up to num_tokens and num_requests.

        Tokens that fill up are those of the padding row, and belong to no request; requests that do have no tokens.
        """
        idle = self.max_num_seqs
        fields = [
            (
                r.row,
                r.start,
                r.num_tokens,
                len(r.block_ids),
                r.samples,
                idle * self.max_blocks - r.start // BLOCK_SIZE if r.is_cached else r.row * self.max_blocks,
            )
            for r in requests
        ]
        rows, starts, counts, num_new, samples, first_index = np.array(fields, dtype=np.int32).reshape(-1, 6).T
        contexts, ends = starts + counts, np.cumsum(counts)
        owner = np.repeat(np.arange(len(requests)), counts)
        num_used = len(owner)

        inputs = np.zeros(4 * num_tokens + 1 + 4 * num_requests, dtype=np.int32)
        tokens = inputs[: 4 * num_tokens].reshape(4, num_tokens)
        tokens[1:, num_used:] = [[idle * self.max_model_len], [idle * self.max_blocks], [-1]]
        positions, token_index, table_index, new_blocks = tokens[:, :num_used]
        positions[:] = np.arange(num_used) + (contexts - ends)[owner]
        token_index[:] = (rows * self.max_model_len)[owner] + positions
        places = positions // BLOCK_SIZE
        table_index[:] = first_index[owner] + places
        # The blocks that a request gained for this step are its last ones; -1 ahead of all of them is for its others.
        gained = np.array([-1, *(block_id for r in requests for block_id in r.block_ids)], dtype=np.int32)
        num_old = (contexts - 1) // BLOCK_SIZE + 1 - num_new
        places -= num_old[owner]
        new_blocks[:] = gained[np.where(places >= 0, (1 + np.cumsum(num_new) - num_new)[owner] + places, 0)]

        query_ends, context_lens, table_rows, wanted = inputs[4 * num_tokens + 1 :].reshape(4, num_requests)
        query_ends[:], table_rows[:] = num_used, idle
        for line, values in ((query_ends, ends), (context_lens, contexts), (table_rows, rows)):
            line[: len(requests)] = values
        wanted[: samples.sum()] = ends[samples > 0] - 1
        return inputs

    def _forward_mixed(
        self,
        inputs: Tensor,
        num_tokens: int,
        num_requests: int,
        num_wanted: int | None,
        num_decodes: int,
        max_query_len: int,
        max_context_len: int,
    ) -> Tensor:
        """Hidden states of the tokens that draw, [num_wanted, hidden_size]; None: of all tokens. Can be captured."""
        self.clock.enter("forward")
        sizes = [num_tokens] * 4 + [num_requests + 1] + [num_requests] * 3
        positions, token_index, table_index, new_blocks, query_start, contexts, rows, wanted = inputs.split(sizes)
        return self.model.forward(
            ForwardBatch(
                token_ids=self.token_ids.view(-1).index_select(0, token_index),
                positions=positions,
                slot_mapping=self._slots(positions, table_index, new_blocks),
                query_start=query_start,
                context_lens=contexts,
                rows=rows,
                block_table=self.block_table,
                num_decodes=num_decodes,
                max_query_len=max_query_len,
                max_context_len=max_context_len,
                wanted=None if num_wanted is None else wanted[:num_wanted],
            )
        )

    def _slots(self, positions: Tensor, table_index: Tensor, new_blocks: Tensor) -> Tensor:
        """Where each token's key and value go. Blocks that are new in this step are put into the table first."""
        table, table_index = self.block_table.view(-1), table_index.long()
        blocks = torch.where(new_blocks >= 0, new_blocks, table.index_select(0, table_index))
        table.index_copy_(0, table_index, blocks)
        return blocks * BLOCK_SIZE + positions % BLOCK_SIZE

    def _set_row(self, new: NewRow) -> None:
        sampling = SamplingRow(new.params, new.num_prompt_tokens, new.stop_token_ids)
        self.rows[new.row] = Row(sampling, len(new.token_ids), self._mask_of(new) if new.params.has_mask else None)
        staged = self._stage(np.concatenate((new.token_ids, new.block_ids), dtype=np.int32))
        num_tokens, num_blocks = len(new.token_ids), len(new.block_ids)
        self.token_ids[new.row, :num_tokens].copy_(staged[:num_tokens], non_blocking=True)
        self.block_table[new.row, :num_blocks].copy_(staged[num_tokens:], non_blocking=True)

    def _set_line(self, row: int) -> None:
        sampling = self.rows[row].sampling
        line = sampling_line.pack(sampling.params, sampling.num_prompt_tokens, sampling.stop_token_ids)
        self.sampling_lines[row, : len(line)].copy_(self._stage(line), non_blocking=True)
        self.rows[row].has_line = True

    def _draw(
        self,
        sampled: list[ScheduledRequest],
        logits: Tensor,
        best: Tensor | None,
        complete: dict[int, list[Logprobs]],
        pooled: dict[int, Tensor],
    ) -> StepResult:
        """Draw the batch's tokens, put them into their rows, and start their way to the host.

        best [S]: the most likely tokens, if they are known and lie in their rows already.
        """
        self.clock.enter("sample")
        rows = [self.rows[request.row].sampling for request in sampled]
        num_top = [row.params.logprobs for row in rows]
        wants_logprobs = any(num is not None for num in num_top)
        raw_logits = logits.clone() if wants_logprobs and any(row.changes_logits for row in rows) else logits
        masks = {i: mask for i, request in enumerate(sampled) if (mask := self.rows[request.row].mask) is not None}
        self._apply_masks(masks, logits)
        token_ids = best
        if token_ids is None or not all(row.takes_best for row in rows):
            token_ids = self._sample(sampled, logits)
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
        result = StepResult(token_ids, logprobs, num_top, prompt_logprobs, prompts, pooled, event, masks)
        self.last_masked = result if masks else None
        return result

    def _mask_of(self, new: NewRow) -> TokenMask:
        grammar = None
        if new.params.grammar:
            assert self.grammars is not None
            grammar = self.grammars.find(new.params.grammar)
            assert grammar is not None, "it lives as long as its request"
        return TokenMask(new.params, grammar, new.token_ids[new.num_prompt_tokens :], self.model.config.vocab_size)

    def _apply_masks(self, masks: dict[int, TokenMask], logits: Tensor) -> None:
        """Rule out the tokens that requests may not draw.   logits [S, vocab]; masks by place among the S

        The model's work on this step is on its way already, so the wait for the tokens before costs no time.
        """
        if not masks:
            return
        if self.last_masked is not None:
            self.last_masked.take_in()
        rows = [i for i, mask in masks.items() if not mask.is_ended]  # an ended one's token is nobody's
        if not rows:
            return
        words = np.empty((len(rows), num_words(logits.shape[1])), np.uint32)
        for line, i in zip(words, rows, strict=True):
            masks[i].fill(line)
        ops.mask_logits(logits, self._upload(words.view(np.int32)), self._upload(rows))

    def _sample(self, sampled: list[ScheduledRequest], logits: Tensor) -> Tensor:
        """Draw a token for each request, and put it into its row."""
        for request in sampled:
            if not self.rows[request.row].has_line:
                self._set_line(request.row)
        fields = [[request.row for request in sampled], [request.start + request.num_tokens for request in sampled]]
        rows, ends = self._upload(np.array(fields, dtype=np.int32))
        return ops.sample(logits, self.sampling_lines, rows, ends, self.token_ids)

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
        return self._stage(np.asarray(values, dtype=np.int32)).to(self.device, non_blocking=True)

    def _stage(self, values: np.ndarray) -> Tensor:
        """Where a copy to the device need not be waited for."""
        host = torch.from_numpy(values)
        return host if self.device.type == "cpu" else host.pin_memory()
