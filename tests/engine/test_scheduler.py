"""The scheduler against a device made of dicts: what a request's attention would read must be its own tokens."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import ScheduledBatch
from engine.messages import AddRequest, TokenOutput
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler

BLOCK = 4
EOS = 0
SPOILT = 100  # a token of prompts after which logits turn into NaN, at once or later
TAINTS = 101  # one whose NaN gets into all keys that are computed in the same chunk, and from there into other ones


def model(tokens: list[int]) -> int:
    """The next token: any function of the whole sequence. 0 ends it, -1 stands for none at all."""
    drawn = hash(tuple(tokens))
    if TAINTS in tokens:
        return -1
    return -1 if SPOILT in tokens and drawn % 4 == 0 else drawn % 23


def expected_output(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    tokens = list(prompt)
    room = min(params.max_tokens or max_model_len, max_model_len - len(prompt))
    while len(tokens) < len(prompt) + room:
        tokens.append(model(tokens))
        if tokens[-1] < 0 or (tokens[-1] == EOS and not params.ignore_eos):
            break
    return tokens[len(prompt) :]


@dataclass
class Device:
    """Memory of slots. A slot holds the prefix that its key was computed from, as attention would need it.

    What comes back from the host does so beside a step: some before it and some behind it, as it happens.
    """

    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)
    host: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)  # the slots of its blocks
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    num_computed: int = 0  # tokens
    tokens: dict[int, list[int]] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    tainted: set[int] = field(default_factory=set)  # slots

    def run(self, batch: ScheduledBatch) -> list[int]:
        for block_id, host_id in batch.paged_out:
            self.host[host_id] = [self.slots[block_id * BLOCK + offset] for offset in range(BLOCK)]
        num_early = self.chance.randint(0, len(batch.paged_in))
        self._page_in(batch.paged_in[:num_early])
        drawn = self._compute(batch)
        self._page_in(batch.paged_in[num_early:])
        return drawn

    def _page_in(self, copies: list[tuple[int, int]]) -> None:
        for host_id, block_id in copies:
            for offset, content in enumerate(self.host[host_id]):
                self.slots[block_id * BLOCK + offset] = content

    def _compute(self, batch: ScheduledBatch) -> list[int]:
        self.num_computed += batch.num_tokens
        for new in batch.new_rows:
            self.tokens[new.row] = list(new.token_ids)
            self.tables[new.row] = list(new.block_ids)
        are_decodes = [request.is_decode for request in batch.requests]
        assert are_decodes == sorted(are_decodes, reverse=True), "decodes come first"
        for request in batch.requests:
            self.tables[request.row].extend(request.block_ids)
            if request.is_decode:  # it may read what is before its own token ahead of this step's writes
                assert request.num_tokens == 1
                self._check(request.row, request.start + request.is_cached)
        for request in batch.requests:
            if request.is_cached:  # others may own the block, so nothing is written
                continue
            computed = range(request.start, request.start + request.num_tokens)
            self.tainted.difference_update(self._slot(request.row, position) for position in computed)
            for position in computed:
                self.slots[self._slot(request.row, position)] = tuple(self.tokens[request.row][: position + 1])
        for request in [*batch.requests, *batch.requests]:  # what one taints another may read, whichever comes first
            end = request.start + request.num_tokens
            is_tainted = TAINTS in self.tokens[request.row][request.start : end] or self._is_tainted(request.row, end)
            if is_tainted and not request.is_cached:
                self.tainted |= {self._slot(request.row, position) for position in range(request.start, end)}
        drawn = []
        for request in batch.requests:
            tokens, end = self.tokens[request.row], request.start + request.num_tokens
            self._check(request.row, end)
            if request.samples:
                assert end == len(tokens)
                drawn.append(-1 if self._is_tainted(request.row, end) else model(tokens))
                tokens.append(max(drawn[-1], 0))
        return drawn

    def _check(self, row: int, end: int) -> None:
        for position in range(end):
            assert self.slots[self._slot(row, position)] == tuple(self.tokens[row][: position + 1])

    def _is_tainted(self, row: int, end: int) -> bool:
        return any(self._slot(row, position) in self.tainted for position in range(end))

    def _slot(self, row: int, position: int) -> int:
        return self.tables[row][position // BLOCK] * BLOCK + position % BLOCK


def make_scheduler(**options) -> Scheduler:
    defaults = {
        "num_blocks": 16,
        "block_size": BLOCK,
        "max_model_len": 40,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 12,
        "max_prefill_chunk": 6,
        "eos_token_ids": [EOS],
    }
    host = options.pop("num_host_blocks", 0), options.pop("min_paged_in", 1)
    scheduler = Scheduler(**(defaults | options))
    if host[0]:
        scheduler.add_host_tier(*host)
    return scheduler


def request(name: str, prompt: list[int], **params) -> AddRequest:
    priority = params.pop("priority", 0)
    salt = params.pop("cache_salt", "")
    leader = params.pop("leader_id", "")
    return AddRequest(name, prompt, SamplingParams(**params), priority, salt, leader)


def run(scheduler: Scheduler, device: Device, depth: int = 1, max_steps: int = 2000) -> list[TokenOutput]:
    """Step until nothing is left, with up to `depth` steps in flight."""
    outputs: list[TokenOutput] = []
    results: deque[list[int]] = deque()
    for _ in range(max_steps):
        if not scheduler.has_work:
            return outputs
        outputs += step(scheduler, device, results, depth)
    raise AssertionError("the scheduler does not come to an end")


def step(scheduler: Scheduler, device: Device, results: deque[list[int]], depth: int) -> list[TokenOutput]:
    batch = scheduler.schedule()
    assert batch.num_tokens <= scheduler.max_num_batched_tokens
    scheduler.check()
    drawn = device.run(batch)
    if batch.requests:
        results.append(drawn)
    if not results or (batch.requests and len(results) < depth):
        return []
    outputs = scheduler.update(results.popleft(), {}, {})
    scheduler.check()
    return outputs


def tokens_of(outputs: list[TokenOutput], name: str) -> list[int]:
    """Its last one is -1 if it ended for want of a token."""
    own = [output for output in outputs if output.request_id == name]
    return [token for output in own for token in (output.token_ids if output.finish_reason != "error" else [-1])]


def test_decodes_keep_their_pace_while_a_long_prompt_is_computed():
    scheduler, device, results = make_scheduler(max_model_len=60), Device(), deque()
    scheduler.add(request("short", [1, 2], max_tokens=20, ignore_eos=True))
    step(scheduler, device, results, 1)
    scheduler.add(request("long", list(range(1, 31)), max_tokens=2, ignore_eos=True))
    for _ in range(5):
        outputs = step(scheduler, device, results, 1)
        assert next(output.request_id for output in outputs) == "short"
        assert scheduler.stats.batch_tokens <= 1 + scheduler.max_prefill_chunk


@pytest.mark.parametrize(("target_s", "num_prompt_tokens"), [(0.200, 300), (0.050, 60), (0.001, BLOCK)])
def test_prompts_are_computed_in_chunks_that_keep_the_pause_between_tokens(target_s, num_prompt_tokens):
    """A step takes 10 ms, and half a millisecond for each token of a prompt; nobody has told the scheduler."""
    scheduler = make_scheduler(
        num_blocks=1000, max_model_len=3000, max_num_batched_tokens=400, max_prefill_chunk=100, target_itl_s=target_s
    )
    scheduler.add(request("short", [1, 2], max_tokens=500, ignore_eos=True))
    device, results, chunks = Device(), deque(), []
    for index in range(60):
        if index == 3:
            scheduler.add(request("long", [1] * 2500, max_tokens=2, ignore_eos=True))
        batch = scheduler.schedule()
        num_decodes = sum(each.num_tokens == 1 for each in batch.requests)
        chunks.append(batch.num_tokens - num_decodes)
        scheduler.note_time(batch, 0.010 + 0.0005 * chunks[-1])
        results.append(device.run(batch))
        scheduler.update(results.popleft(), {}, {})
        if num_decodes and chunks[-1] and index > 5:
            break
    assert chunks[3] == 49, "at first as without a target"
    assert chunks[-1] == pytest.approx(num_prompt_tokens, abs=25)
    assert chunks[-1] == BLOCK or 0.010 + 0.0005 * chunks[-1] <= target_s


def test_a_repeated_prompt_computes_only_what_the_cache_lacks():
    scheduler, device = make_scheduler(), Device()
    prompt = list(range(1, 12))
    scheduler.add(request("first", prompt, max_tokens=1))
    run(scheduler, device)
    scheduler.add(request("again", prompt, max_tokens=1))
    outputs = run(scheduler, device)
    assert outputs[0].num_cached_tokens == 8
    assert scheduler.stats.batch_tokens == 3


def test_a_prompt_of_known_blocks_alone_is_a_decode_that_leaves_them_as_they_are():
    scheduler, device = make_scheduler(max_prefill_chunk=12), Device()
    prompt = list(range(1, 13))
    scheduler.add(request("first", prompt, max_tokens=1))
    run(scheduler, device)
    scheduler.add(request("again", prompt, max_tokens=4, ignore_eos=True))
    batch = scheduler.schedule()
    (again,) = batch.requests
    assert (again.start, again.num_tokens, again.is_decode, again.is_cached) == (11, 1, True, True)
    scheduler.update(device.run(batch), {}, {})
    outputs = run(scheduler, device)
    assert device.num_computed == 12 + 4
    assert len(outputs) == 3


def test_a_prompt_of_blocks_that_its_own_step_fills_computes_the_last_of_them():
    scheduler, device = make_scheduler(max_num_batched_tokens=16, max_prefill_chunk=16), Device()
    prompt = list(range(1, 13))
    for name in ("first", "second"):
        scheduler.add(request(name, prompt, max_tokens=1))
    batch = scheduler.schedule()
    assert [(r.start, r.num_tokens, r.is_decode, r.is_cached) for r in batch.requests] == [
        (0, 12, False, False),
        (8, 4, False, False),
    ]
    device.run(batch)


def test_tenants_do_not_share_blocks():
    scheduler, device = make_scheduler(), Device()
    prompt = list(range(1, 12))
    scheduler.add(request("first", prompt, max_tokens=1, cache_salt="a"))
    run(scheduler, device)
    scheduler.add(request("other", prompt, max_tokens=1, cache_salt="b"))
    assert run(scheduler, device)[0].num_cached_tokens == 0


@pytest.mark.parametrize("caching", [True, False])
def test_sequences_of_one_prompt_share_its_full_blocks(caching: bool):
    scheduler = make_scheduler(enable_prefix_caching=caching)
    prompt = list(range(1, 11))
    scheduler.add(request("r-0", prompt, max_tokens=3, ignore_eos=True))
    scheduler.add(request("r-1", prompt, max_tokens=3, ignore_eos=True, leader_id="r-0"))
    scheduler.add(request("stranger", prompt, max_tokens=3, ignore_eos=True))
    device, results = Device(), deque()
    for _ in range(2):
        step(scheduler, device, results, 1)
    first, second, *stranger = (r.block_ids[:2] for r in scheduler.running)
    assert first == second
    assert all((blocks == first) == caching for blocks in stranger)
    run(scheduler, device)


def test_the_latest_arrival_gives_way_when_blocks_run_out():
    scheduler, device, results = make_scheduler(num_blocks=10, max_model_len=36), Device(), deque()
    scheduler.answer_length.add(1)  # so that nobody expects them to be as long as they are
    for name in ("a", "b", "c"):
        scheduler.add(request(name, [ord(name)] * 9, max_tokens=20, ignore_eos=True))
    finished: list[str] = []
    while scheduler.has_work:
        outputs = step(scheduler, device, results, 1)
        finished += [output.request_id for output in outputs if output.finish_reason]
    assert scheduler.stats.num_preemptions > 0
    assert finished[0] == "a"
    assert sorted(finished) == ["a", "b", "c"]


def test_priority_goes_before_arrival():
    scheduler, device = make_scheduler(max_num_seqs=1, policy="priority"), Device()
    scheduler.add(request("late", [1, 2, 3], max_tokens=2, ignore_eos=True, priority=5))
    scheduler.add(request("urgent", [4, 5, 6], max_tokens=2, ignore_eos=True, priority=-1))
    outputs = run(scheduler, device)
    assert [output.request_id for output in outputs] == ["urgent", "urgent", "late", "late"]


def test_stop_tokens_end_a_request_and_say_which():
    prompt = [7, 8, 9]
    third = expected_output(prompt, SamplingParams(max_tokens=9, ignore_eos=True), 40)[2]
    scheduler, device = make_scheduler(), Device()
    scheduler.add(request("r", prompt, max_tokens=9, ignore_eos=True, stop_token_ids=[third]))
    last = run(scheduler, device)[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", third)


def test_a_request_without_a_token_ends_and_its_blocks_are_not_found_again():
    scheduler, device = make_scheduler(), Device()
    prompts = ([*range(1, 12), SPOILT, i] for i in range(100))
    spoilt = next(prompt for prompt in prompts if model(prompt) < 0)
    scheduler.add(request("spoilt", spoilt, max_tokens=9))
    scheduler.add(request("neighbour", [1, 2, 3], max_tokens=9, ignore_eos=True))
    outputs = run(scheduler, device, depth=2)
    assert [(o.token_ids, o.finish_reason) for o in outputs if o.request_id == "spoilt"] == [([], "error")]
    sound = SamplingParams(max_tokens=9, ignore_eos=True)
    assert tokens_of(outputs, "neighbour") == expected_output([1, 2, 3], sound, 40)

    scheduler.add(request("again", spoilt[:11], max_tokens=1))
    assert run(scheduler, device)[0].num_cached_tokens == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nan_in_shared_blocks_is_not_their_next_owners_fault(depth: int):
    """Both come at once: the blocks of their prefix are computed with the token that taints them, and found at once."""
    scheduler, device = make_scheduler(max_num_batched_tokens=40, max_prefill_chunk=40), Device()
    prefix, sound = list(range(1, 12)), SamplingParams(max_tokens=6, ignore_eos=True)
    scheduler.add(request("taints", [*prefix, TAINTS], max_tokens=6))
    for name in ("a", "b"):
        scheduler.add(request(name, [*prefix, 1, 2], max_tokens=6, ignore_eos=True))
    outputs = run(scheduler, device, depth)
    assert tokens_of(outputs, "taints") == [-1]
    for name in ("a", "b"):
        assert tokens_of(outputs, name) == expected_output([*prefix, 1, 2], sound, 40)
    assert device.tainted, "or the story is another one"


def test_waste_counts_the_empty_ends_of_last_blocks():
    scheduler, device, results = make_scheduler(), Device(), deque()
    scheduler.add(request("r", [1, 2, 3, 4, 5], max_tokens=9, ignore_eos=True))
    step(scheduler, device, results, 1)
    assert (scheduler.stats.num_slots_allocated, scheduler.stats.num_slots_used) == (8, 5)


def crowd(**options) -> tuple[Scheduler, Device, list[TokenOutput]]:
    """Three requests that have no room together, and what came of them."""
    scheduler, device = make_scheduler(num_blocks=10, max_model_len=36, **options), Device()
    scheduler.answer_length.add(1)  # so that nobody expects them to be as long as they are
    for name in ("a", "b", "c"):
        scheduler.add(request(name, [ord(name)] * 9, max_tokens=20, ignore_eos=True))
    return scheduler, device, run(scheduler, device)


def test_a_preempted_request_goes_on_with_what_the_host_kept():
    alone, computed_again, expected = crowd()
    with_host, computed_once, outputs = crowd(num_host_blocks=20)
    assert alone.stats.num_preemptions == with_host.stats.num_preemptions > 0
    assert with_host.stats.num_blocks_paged_in > 0
    assert computed_once.num_computed < computed_again.num_computed
    for name in ("a", "b", "c"):
        assert tokens_of(outputs, name) == tokens_of(expected, name)


def flushed(first_token: int = 1, **options) -> tuple[Scheduler, Device, list[int]]:
    """A scheduler whose device has forgotten a prompt, since others needed the memory."""
    scheduler, device = make_scheduler(**({"num_host_blocks": 40} | options)), Device()
    prompt = [first_token, *range(2, 30)]
    scheduler.add(request("first", prompt, max_tokens=1))
    run(scheduler, device)
    for i in range(3):
        scheduler.add(request(f"other{i}", [i + 40] * 30, max_tokens=1))
        run(scheduler, device)
    return scheduler, device, prompt


def test_a_prompt_that_the_device_has_forgotten_comes_back_from_the_host():
    scheduler, device, prompt = flushed()
    num_computed = device.num_computed
    scheduler.add(request("again", prompt, max_tokens=1))
    assert run(scheduler, device)[0].num_cached_tokens == 28
    assert device.num_computed - num_computed == 1
    assert scheduler.stats.num_blocks_paged_in == 7
    assert 7 < scheduler.stats.num_host_blocks_used <= scheduler.stats.num_host_blocks


def test_what_takes_longer_to_come_back_than_to_compute_is_computed():
    scheduler, device, prompt = flushed(min_paged_in=8)
    scheduler.add(request("again", prompt, max_tokens=1))
    assert run(scheduler, device)[0].num_cached_tokens == 0
    assert scheduler.stats.num_blocks_paged_in == 0


def test_a_tenant_does_not_find_what_the_host_keeps_for_another():
    scheduler, device, prompt = flushed()
    scheduler.add(request("other tenant", prompt, max_tokens=1, cache_salt="b"))
    assert run(scheduler, device)[0].num_cached_tokens == 0


def test_the_host_forgets_a_sequence_that_has_come_to_infinite_logits():
    scheduler, device, prompt = flushed(first_token=SPOILT)
    scheduler.add(request("ends in error", prompt, max_tokens=11, ignore_eos=True))
    outputs = run(scheduler, device)
    assert (outputs[0].num_cached_tokens, outputs[-1].finish_reason) == (28, "error")
    scheduler.add(request("again", prompt, max_tokens=1))
    assert run(scheduler, device)[0].num_cached_tokens == 0


def test_a_step_brings_back_no_more_tokens_than_it_would_compute():
    scheduler, device, prompt = flushed(max_num_batched_tokens=8)
    scheduler.add(request("again", prompt, max_tokens=1))
    counts = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        counts.append((len(batch.paged_in), batch.num_tokens))
        if drawn := device.run(batch):
            scheduler.update(drawn, {}, {})
    assert counts == [(2, 0), (2, 0), (2, 0), (1, 0), (0, 1)]


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step at which it arrives
        st.integers(0, 2),  # which shared prefix its prompt begins with
        st.integers(1, 30),  # prompt length
        st.integers(1, 20),  # max_tokens
        st.integers(-1, 1),  # priority
        st.one_of(st.none(), st.integers(0, 25)),  # the step after its arrival at which it is aborted
        st.booleans(),  # ignore_eos
        st.sampled_from([None, None, SPOILT, TAINTS]),  # its prompt's last token, instead of its own
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals,
    st.integers(8, 24),
    st.integers(1, 5),
    st.integers(5, 20),
    st.integers(1, 8),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["fcfs", "priority"]),
    st.sampled_from([0, 2, 10, 60]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_every_request_gets_its_own_tokens_whatever_happens_around_it(
    arrivals,
    num_blocks,
    max_num_seqs,
    budget,
    chunk,
    depth,
    caching,
    policy,
    num_host_blocks,
    min_paged_in,
    answer_length,
    chance,
):
    max_model_len = min(40, num_blocks * BLOCK)
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
        enable_prefix_caching=caching,
        policy=policy,
        num_host_blocks=num_host_blocks,
        min_paged_in=min_paged_in,
    )
    scheduler.answer_length.add(answer_length)  # expects too little, and preempts, or too much, and waits
    prefixes = [[p + 1] * 30 for p in range(3)]
    device, results, outputs = Device(chance=chance), deque(), []
    requests, aborts = {}, {}
    for clock in range(3000):
        for i, (at, prefix, length, max_tokens, priority, abort_after, ignore_eos, last) in enumerate(arrivals):
            if at == clock:
                prompt = [*prefixes[prefix][: length // 2], *range(1, length - length // 2 + 1)][: max_model_len - 1]
                prompt[-1] = last or prompt[-1]
                requests[f"r{i}"] = request(
                    f"r{i}", prompt, max_tokens=max_tokens, ignore_eos=ignore_eos, priority=priority
                )
                scheduler.add(requests[f"r{i}"])
            if abort_after is not None and at + abort_after == clock:
                scheduler.abort([f"r{i}"])
                aborts[f"r{i}"] = True
                scheduler.check()
        outputs += step(scheduler, device, results, depth)
        if clock > 40 and not scheduler.has_work:
            break
    assert not scheduler.has_work, "every request finishes"
    assert scheduler.pool.num_free == num_blocks, "no block is leaked"
    for name, sent in requests.items():
        expected = expected_output(sent.prompt_token_ids, sent.params, max_model_len)
        drawn = tokens_of(outputs, name)
        assert drawn == (expected[: len(drawn)] if name in aborts else expected)


def test_less_than_four_percent_of_the_cache_is_wasted_on_a_realistic_mix_of_lengths():
    """64 requests at a time, prompts and outputs of 100 to 1,024 tokens, blocks of 16, measured at every step."""
    rng = random.Random(0)
    scheduler = make_scheduler(
        num_blocks=9000,
        block_size=16,
        max_model_len=2100,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        max_prefill_chunk=1024,
    )
    for i in range(128):
        prompt = [rng.randrange(1, 1000) for _ in range(rng.randint(100, 1024))]
        scheduler.add(request(f"r{i}", prompt, max_tokens=rng.randint(100, 1024), ignore_eos=True))
    allocated = used = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        allocated += scheduler.stats.num_slots_allocated
        used += scheduler.stats.num_slots_used
        scheduler.update([1] * sum(step.samples for step in batch.requests), {}, {})
    assert 0 < 1 - used / allocated < 0.04


@pytest.mark.parametrize(
    ("num_blocks", "prompt", "answer", "max_tokens"),
    [
        (400, (10, 60), (100, 300), None),
        (400, (10, 60), (100, 300), 300),
        (400, (80, 120), (80, 120), None),
        (1000, (1, 4), (200, 300), None),
        (150, (10, 100), (100, 400), None),
    ],
)
def test_under_any_load_little_is_computed_twice(num_blocks, prompt, answer, max_tokens):
    """Ten times what fits wants to run at once; how long answers become is told by nobody."""
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        max_model_len=500,
        max_num_seqs=200,
        max_num_batched_tokens=500,
        max_prefill_chunk=250,
        enable_prefix_caching=False,
    )
    draw, num_answer_tokens, num_computed = random.Random(0), dict[str, int](), 0
    for index in range(200):
        num_answer_tokens[str(index)] = draw.randint(*answer)
        scheduler.add(request(str(index), [1] * draw.randint(*prompt), max_tokens=max_tokens))
    while scheduler.has_work:
        batch = scheduler.schedule()
        num_computed += batch.num_tokens
        drawing = scheduler.in_flight[0]
        scheduler.update([r.num_output_tokens < num_answer_tokens[r.request_id] for r in drawing], {}, {})
        if not batch.num_tokens % 50:
            scheduler.check()
    num_useful = scheduler.stats.prompt_tokens + scheduler.stats.generation_tokens
    assert num_computed < 1.25 * num_useful
    assert scheduler.stats.num_preemptions < 200
