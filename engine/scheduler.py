"""Who gets how many tokens in a step.

Every step fills one token budget in the order of service: a running request that decodes gets its one token, the rest
of the budget goes to prefill chunks, of running requests first and then of waiting ones. When blocks run out, the
running request served last is preempted: it gives up its blocks and computes its tokens again later. The request served
first is never preempted, so the engine always moves on.

Steps may be in flight: `schedule` counts on what they will do, `update` learns what they drew.
"""

import struct
import time
from array import array
from bisect import insort
from collections import deque
from collections.abc import Iterable

from engine.batch import NewRow, ScheduledBatch, ScheduledRequest
from engine.block_pool import BlockPool, PrefixHashes
from engine.growth import AnswerLength, room_to_grow
from engine.host_tier import HostTier
from engine.messages import AddRequest, EngineStats, TokenLogprob, TokenOutput
from engine.request import Request
from engine.step_time import StepTime

TARGET_SHARE = 0.85  # of the pause to keep, for a step beside decodes: half of the steps take longer than was foretold
MIXED_TOKENS_PER_DECODE = 8  # tokens of a step that prefills beside decodes: prompts of 7 times their output keep up


class Scheduler:
    """Owns the requests: waiting, running, and what the steps in flight will bring."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_chunk: int,
        target_itl_s: float | None = None,
        enable_prefix_caching: bool = True,
        policy: str = "fcfs",
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        assert max_model_len <= num_blocks * block_size, "a request of full length must fit"
        assert max_num_seqs <= max_num_batched_tokens, "every running request must get its token"
        self.pool = BlockPool(num_blocks, block_size)
        self.host_tier: HostTier | None = None
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_chunk = max_prefill_chunk
        self.target_itl_s = target_itl_s
        self.step_time = StepTime()  # known with a target alone
        self.enable_prefix_caching = enable_prefix_caching
        self.policy = policy
        self.eos_token_ids = frozenset(eos_token_ids)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []  # in order of service, like running
        self.running: list[Request] = []
        self.free_rows = deque(range(max_num_seqs))
        self.answer_length = AnswerLength()
        # For want of room to grow: that changes when somebody gives blocks back.
        self._put_off: Request | None = None
        self._filled_now: set[int] = set()  # blocks that the step which is being scheduled completes
        self.in_flight: deque[list[Request]] = deque()  # for each step in flight, the requests that draw a token
        self.num_compiling = 0  # requests that are added when their grammar is ready
        self.stats = EngineStats(num_blocks=num_blocks)
        self._num_arrivals = 0

    def add_host_tier(self, num_blocks: int, min_paged_in: int) -> None:
        """From now on, the host keeps what the device forgets."""
        self.host_tier = HostTier(self.pool, num_blocks, min_paged_in)
        self.stats.num_host_blocks = num_blocks

    def add(self, message: AddRequest, grammar: object = None) -> None:
        """Queue a request. Its prompt is shorter than max_model_len: the front door has seen to that.

        grammar: its compiled grammar, which lives as long as the request.
        """
        num_prompt_tokens = len(message.prompt_token_ids)
        assert 0 < num_prompt_tokens < self.max_model_len, num_prompt_tokens
        assert message.request_id not in self.requests, message.request_id
        room = self.max_model_len - num_prompt_tokens
        token_ids = array("i")
        for part in (message.prompt_token_ids, message.output_token_ids):
            token_ids.frombytes(struct.pack(f"{len(part)}i", *part))  # an array of a list takes twice as long
        self._num_arrivals += 1
        # Without a prefix cache only the sequences of one prompt (n > 1) share blocks.
        salt = (
            message.cache_salt if self.enable_prefix_caching else "request:" + (message.leader_id or message.request_id)
        )
        request = Request(
            request_id=message.request_id,
            token_ids=token_ids,
            prefix=PrefixHashes(salt, self.block_size),
            num_prompt_tokens=num_prompt_tokens,
            params=message.params,
            max_tokens=min(message.params.max_tokens or room, room),
            eos_token_ids=self.eos_token_ids,
            order=(message.priority if self.policy == "priority" else 0, self._num_arrivals),
            grammar=grammar,
        )
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=_order)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests, wherever they are; unknown ids have finished meanwhile."""
        for request_id in request_ids:
            if (request := self.requests.get(request_id)) is not None:
                self._finish(request, "abort")
        self._measure()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.in_flight)

    def schedule(self) -> ScheduledBatch:
        """Give this step's token budget to requests. The caller runs the batch, unless there is nothing in it."""
        self._filled_now.clear()
        new_rows: list[NewRow] = []
        scheduled: list[tuple[Request, ScheduledRequest]] = []
        num_preemptions = self.stats.num_preemptions
        running = [(request, request.num_tokens_due) for request in self.running]
        num_decodes = sum(due == 1 for _, due in running)
        prefill_budget = self.max_num_batched_tokens - num_decodes
        if num_decodes:
            prefill_budget = min(prefill_budget, self._prefill_beside(num_decodes))

        for request, due in running:
            if request.row < 0:
                break  # preempted just now, and so is every request behind it
            num_tokens = due if due <= 1 else min(due, prefill_budget)
            if num_tokens == 0 or not self._make_room(request, num_tokens):
                continue
            if due > 1:
                prefill_budget -= num_tokens
            scheduled.append((request, self._schedule(request, num_tokens, is_decode=due == 1)))

        while self.waiting and prefill_budget > 0 and self.stats.num_preemptions == num_preemptions:
            request = self.waiting[0]
            num_tokens = self._admit(request, prefill_budget)
            if num_tokens == 0:
                break
            prefill_budget -= num_tokens
            is_decode = num_tokens == 1 and self._filled_now.isdisjoint(request.block_ids)
            step = self._schedule(request, num_tokens, is_decode)
            new_rows.append(self._new_row(request, step))
            scheduled.append((request, step))

        scheduled.sort(key=lambda pair: not pair[1].is_decode)  # those first, otherwise in the order of service
        batch = ScheduledBatch(new_rows, [step for _, step in scheduled])
        if self.host_tier is not None:
            batch.paged_out, batch.paged_in = self.host_tier.plan()
            self.stats.num_blocks_paged_in += len(batch.paged_in)
            self.stats.num_blocks_paged_out += len(batch.paged_out)
        if scheduled:
            self.in_flight.append([request for request, step in scheduled if step.samples])
            self.stats.num_steps += 1
            self.stats.batch_tokens = batch.num_tokens
        self._measure()
        return batch

    def update(
        self,
        token_ids: list[int],
        logprobs: dict[int, TokenLogprob],
        prompt_logprobs: dict[int, list[TokenLogprob | None]],
        embeddings: dict[int, bytes] = {},  # noqa: B006 (read only)
        ended: dict[int, str] = {},  # noqa: B006
    ) -> list[TokenOutput]:
        """Take in the oldest step in flight: one token for each request that drew, in the batch's order, -1 for none.

        All the rest is keyed by the request's place among those. ended: those whose grammar allows nothing more, with
        what it failed at; then the token is none of its.
        """
        requests = self.in_flight.popleft()
        assert len(requests) == len(token_ids), (len(requests), len(token_ids))
        outputs = []
        for i, (request, token_id) in enumerate(zip(requests, token_ids, strict=True)):
            request.num_in_flight -= 1
            if request.finish_reason is not None:
                continue  # ended while this step was under way: the token is beyond its end
            if request.num_void:
                request.num_void -= 1
                continue
            if ended.get(i):
                self._finish(request, "error")
                outputs.append(TokenOutput(request.request_id, [], finish_reason="error", error=ended[i]))
                continue
            if token_id < 0:
                if not self._starts_over(request):
                    self._finish(request, "error")
                    outputs.append(TokenOutput(request.request_id, [], finish_reason="error"))
                continue
            if request.params.pooling is not None:
                outputs.append(self._finish_pooled(request, embeddings[i]))
                continue
            request.token_ids.append(token_id)
            self._remember_full_blocks(request)
            is_first = len(request.token_ids) == request.num_prompt_tokens + 1
            reason = "stop" if i in ended else request.finish_reason_after(token_id)
            if reason is not None:
                self._finish(request, reason)
            self.stats.generation_tokens += 1
            self.stats.prompt_tokens += request.num_prompt_tokens if is_first else 0  # once, whatever restarts
            outputs.append(
                TokenOutput(
                    request_id=request.request_id,
                    token_ids=[token_id],
                    finish_reason=reason,
                    stop_reason=token_id if reason == "stop" and request.is_named_stop(token_id) else None,
                    ends_in_text=i in ended and not request.is_stop(token_id),
                    logprobs=[logprobs[i]] if i in logprobs else None,
                    prompt_logprobs=prompt_logprobs.get(i),
                    num_cached_tokens=request.num_cached_tokens if is_first else 0,
                    scheduled_time=request.scheduled_time if is_first else 0.0,
                )
            )
        self._measure()
        return outputs

    def _finish_pooled(self, request: Request, embedding: bytes) -> TokenOutput:
        """The end of a request that is there for its prompt's hidden states: what was drawn is not looked at."""
        self._finish(request, "stop")
        self.stats.prompt_tokens += request.num_prompt_tokens
        return TokenOutput(
            request.request_id,
            [],
            finish_reason="stop",
            num_cached_tokens=request.num_cached_tokens,
            scheduled_time=request.scheduled_time,
            embedding=embedding,
        )

    def note_time(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learn what a step has taken, for the target."""
        if self.target_itl_s is not None:
            self.step_time.add(batch.num_decodes, batch.num_tokens - batch.num_decodes, seconds)

    def _starts_over(self, request: Request) -> bool:
        """After NaN or infinite logits: whether they may be the fault of others; then it goes on without their blocks.

        Who has NaN may leave it in blocks of the tokens before, too (attention multiplies masked values with 0), and
        others take those up before anybody knows.
        """
        self.pool.forget(request.prefix)
        if self.host_tier is not None:
            self.host_tier.host_pool.forget(request.prefix)
        if request.computes_all or not request.has_found_blocks:
            return False
        request.computes_all = True
        request.num_cached_tokens = 0
        request.num_void = request.num_in_flight
        if request.row >= 0:
            self._preempt(request)
        return True

    def _prefill_beside(self, num_decodes: int) -> int:
        """Prompt tokens for a step that also decodes: many decodes end soon, and prompts must come in as fast.

        Decodes beside a prompt cost little, since the weights are read anyway; a longer step costs them their pace.
        """
        if self.target_itl_s is not None:
            num_in_time = self.step_time.prompt_tokens_within(TARGET_SHARE * self.target_itl_s)
            if num_in_time is not None:
                return max(num_in_time, self.block_size)  # prompts move on in any case
        most = self.max_prefill_chunk
        unit = 1 << max((most // 8).bit_length() - 1, 0)  # so many more fill the next graph and tiles of its products
        num_tokens = -(-MIXED_TOKENS_PER_DECODE * num_decodes // unit) * unit
        num_tokens = min(most, max(most // 2, num_tokens))
        return max(num_tokens - num_decodes, most // 4, 1)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Free blocks for num_tokens more of a running request; False if it had to give way itself."""
        while self.pool.num_free < self._num_blocks_needed(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Send a running request back to wait; its tokens stay, their KV is computed again."""
        self._release(request)
        request.num_computed_tokens = 0
        insort(self.waiting, request, key=_order)
        self.stats.num_preemptions += 1

    def _admit(self, request: Request, budget: int) -> int:
        """Move the first waiting request to running, with its known prefix; how many tokens it may compute, or 0."""
        if not self.free_rows or request.num_in_flight or request is self._put_off:
            return 0
        prefix = self._find_prefix(request)
        num_cached = min(len(prefix) * self.block_size, len(request.token_ids) - 1)  # one at least must be computed
        num_tokens = min(len(request.token_ids) - num_cached, budget)
        # Room for all it has, not for the first chunk alone: fewer requests are admitted just to be preempted.
        num_needed = -(-len(request.token_ids) // self.block_size) - len(prefix)
        num_free = self.pool.num_free - self.pool.num_free_of(prefix)
        if num_needed > num_free:
            return 0
        if self.running and not self._leaves_room(request, num_needed, num_free - num_needed):
            self._put_off = request
            return 0
        if self._brings_back(request, budget):
            return 0  # found in the cache by the next step
        self.waiting.pop(0)
        insort(self.running, request, key=_order)
        self.pool.share(prefix)
        request.block_ids = prefix
        request.num_computed_tokens = num_cached
        request.num_registered_blocks = len(prefix)
        request.has_found_blocks = bool(prefix)
        request.row = self.free_rows.popleft()
        if not request.scheduled_time:
            request.scheduled_time = time.monotonic()
            request.num_cached_tokens = num_cached
        self.stats.prefix_cache_queries += len(request.token_ids)
        self.stats.prefix_cache_hits += num_cached
        return num_tokens

    def _leaves_room(self, newcomer: Request, num_blocks: int, num_free: int) -> bool:
        """Whether the running requests and a newcomer, which takes num_blocks, can grow into what is free then.

        If not it would be admitted just to be preempted, or to have others preempted. Nobody who runs lacks blocks for
        tokens that it has: this step has given them out, or there would be nothing left for a newcomer.
        """
        expected = self.answer_length
        if (len(self.running) + 1) * expected.longest <= num_free * self.block_size:
            return True  # as mostly: what follows takes longer than a step is scheduled
        ends = [(num_blocks, expected.remaining(newcomer.num_output_tokens, newcomer.max_tokens))]
        for request in self.running:
            # The prefix that it was given may be others', too.
            num_own = len(request.block_ids) + -request.num_cached_tokens // self.block_size
            ends.append((num_own, expected.remaining(request.num_output_tokens, request.max_tokens)))
        return room_to_grow(ends, self.block_size) <= num_free

    def _find_prefix(self, request: Request) -> list[int]:
        if request.needs_every_position:
            return []
        found = self.pool.find(request.prefix, request.token_ids, len(request.token_ids) // self.block_size)
        if len(found) * self.block_size == len(request.token_ids) and not self._filled_now.isdisjoint(found):
            found.pop()  # the last token alone would be a decode, which reads what is cached before this step
        return found

    def _brings_back(self, request: Request, budget: int) -> bool:
        """Whether blocks of a waiting request that the host knows are on their way to the device.

        They are no more than the step would compute at most: what comes back takes less time than that.
        """
        if self.host_tier is None or request.needs_every_position:
            return False
        request.prefix.extend(request.token_ids)
        longest = (len(request.token_ids) - 1) // self.block_size
        return self.host_tier.bring_back(request.prefix, longest, max(budget // self.block_size, 1))

    def _schedule(self, request: Request, num_tokens: int, is_decode: bool) -> ScheduledRequest:
        """Book num_tokens of a running request for this step; there is room for them."""
        block_ids = self.pool.allocate(self._num_blocks_needed(request, num_tokens))
        request.block_ids.extend(block_ids)
        start = request.num_computed_tokens
        is_cached = start < request.num_registered_blocks * self.block_size
        request.num_computed_tokens += num_tokens
        samples = request.num_computed_tokens == request.num_tokens
        request.num_in_flight += samples
        num_before = request.num_registered_blocks
        self._remember_full_blocks(request)
        self._filled_now.update(request.block_ids[num_before : request.num_registered_blocks])
        return ScheduledRequest(request.row, start, num_tokens, samples, block_ids, is_decode, is_cached)

    def _new_row(self, request: Request, step: ScheduledRequest) -> NewRow:
        """All that the device must know of a request that got its row in this step."""
        step.block_ids = []  # they travel with the row
        return NewRow(
            row=request.row,
            params=request.params,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            block_ids=request.block_ids,
            stop_token_ids=sorted(request.stop_token_ids) if request.params.min_tokens else [],
        )

    def _num_blocks_needed(self, request: Request, num_tokens: int) -> int:
        return -(-(request.num_computed_tokens + num_tokens) // self.block_size) - len(request.block_ids)

    def _remember_full_blocks(self, request: Request) -> None:
        """Make blocks findable as soon as their tokens are known and the step that fills them is on its way."""
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        if num_full <= request.num_registered_blocks:
            return
        request.prefix.extend(request.token_ids)
        for i in range(request.num_registered_blocks, num_full):
            self.pool.remember(request.block_ids[i], request.prefix, i)
        request.num_registered_blocks = num_full

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if reason in ("stop", "length") and request.params.pooling is None:
            self.answer_length.add(request.num_output_tokens)
        del self.requests[request.request_id]
        if request.row >= 0:
            self._release(request)
        else:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        """Take a running request's blocks and row. Steps in flight may still write there: later ones come after."""
        self.running.remove(request)
        self._put_off = None
        self.pool.free(request.block_ids)
        request.block_ids = []
        self.free_rows.append(request.row)
        request.row = -1

    def _measure(self) -> None:
        stats = self.stats
        stats.num_running, stats.num_waiting = len(self.running), len(self.waiting) + self.num_compiling
        stats.num_blocks_used = self.pool.num_blocks - self.pool.num_free
        stats.num_slots_allocated = stats.num_blocks_used * self.block_size
        # Only the end of a request's last block can be empty, and that block is its own.
        empty = sum(len(r.block_ids) * self.block_size - r.num_computed_tokens for r in self.running)
        stats.num_slots_used = stats.num_slots_allocated - empty
        if self.host_tier is not None:
            stats.num_host_blocks_used = self.host_tier.host_pool.num_remembered

    def check(self) -> None:
        """Assert every invariant of the scheduler and its pool."""
        self.pool.check()
        if self.host_tier is not None:
            self.host_tier.check()
        assert self.running == sorted(self.running, key=_order)
        assert self.waiting == sorted(self.waiting, key=_order)
        assert set(self.requests.values()) == {*self.waiting, *self.running}
        rows = [request.row for request in self.running] + list(self.free_rows)
        assert sorted(rows) == list(range(len(rows))), rows
        owners: dict[int, int] = {}
        for request in self.running:
            assert len(set(request.block_ids)) == len(request.block_ids), request.block_ids
            assert len(request.block_ids) * self.block_size >= request.num_computed_tokens
            assert request.num_computed_tokens <= request.num_tokens
            for block_id in request.block_ids:
                owners[block_id] = owners.get(block_id, 0) + 1
        for request in self.waiting:
            assert not request.block_ids, request.block_ids
            assert request.row == -1
        assert owners == {b: n for b, n in enumerate(self.pool._ref_counts) if n}, "blocks leaked or shared wrongly"


def _order(request: Request) -> tuple[int, int]:
    return request.order
