"""The whole engine against transformers, greedy token for token, whatever the batching."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine import model_runner
from engine.config import EngineConfig
from engine.core import STEPS_PER_CAPTURE, EngineCore
from engine.cuda_graphs import Graphs
from engine.errors import UserError
from engine.host_cache import HostCache
from engine.messages import AddRequest, TokenOutput
from engine.sampling_params import SamplingParams
from engine.worker import prefill_chunk

NUM_TOKENS = 20
FAMILIES = [
    ("llama", {}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi3", {}),
    ("smollm3", {}),
]


def make_prompts() -> list[list[int]]:
    """Short and long ones, some that begin alike, one twice."""
    generator = torch.Generator().manual_seed(3)
    random = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (1, 2, 15, 16, 17, 40, 61, 33)]
    return [*random, [*random[6][:50], 7, 8, 9], random[5], random[6][:32]]


def make_core(folder: Path, **options) -> EngineCore:
    defaults = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 20, "max_num_seqs": 4}
    return EngineCore(EngineConfig(model=str(folder), **(defaults | options)))


def run(core: EngineCore) -> Iterator[TokenOutput]:
    for _ in range(5000):
        if not core.has_work:
            return
        yield from core.step()
        core.scheduler.check()
    raise AssertionError("the engine does not come to an end")


def generate(core: EngineCore, prompts: list[list[int]], **params) -> list[list[int]]:
    params = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | params
    for i, prompt in enumerate(prompts):
        core.add(AddRequest(str(i), prompt, SamplingParams(**params)))
    tokens: list[list[int]] = [[] for _ in prompts]
    for output in run(core):
        tokens[int(output.request_id)] += output.token_ids
    return tokens


def generate_by_transformers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_greedy_tokens_equal_those_of_transformers(tiny_checkpoint, family: str, overrides: dict):
    """Chunked prefill, mixed batches, prefix hits and preemptions on the way."""
    folder = tiny_checkpoint(family, **overrides)
    prompts = make_prompts()
    expected = generate_by_transformers(folder, prompts)
    whole = make_core(folder, max_num_seqs=16)
    assert generate(whole, prompts) == expected
    block_bytes = (1 << 20) // whole.ready.num_blocks
    cramped = make_core(
        folder,
        max_num_batched_tokens=24,
        max_prefill_chunk=9,
        max_model_len=96,
        kv_cache_memory=8 * block_bytes,
    )
    assert generate(cramped, prompts) == expected
    stats = cramped.stats
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0


def test_a_target_for_the_pause_changes_chunks_and_no_tokens(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    core = make_core(folder, target_itl_s=1e-6)
    assert generate(core, make_prompts()) == generate(make_core(folder), make_prompts())
    assert core.scheduler.step_time.prompt_tokens_within(1e-6) == 0, "steps have been timed, and take longer"


def test_seeded_draws_do_not_depend_on_the_batch_or_a_restart(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    params = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    together = generate(make_core(folder), make_prompts(), **params)
    for prompt, tokens in zip(make_prompts()[:4], together, strict=False):
        assert generate(make_core(folder, max_num_batched_tokens=8), [prompt], **params) == [tokens]


def test_logprobs_and_prompt_logprobs_equal_those_of_transformers(tiny_checkpoint):
    import transformers

    folder = tiny_checkpoint("llama")
    prompt = make_prompts()[6]
    core = make_core(folder, max_num_batched_tokens=16)
    core.add(AddRequest("r", prompt, SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1)))
    outputs = list(run(core))
    tokens = [token for output in outputs for token in output.token_ids]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    found = outputs[0].prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert len(found) == len(prompt)
    for i, entry in enumerate(found[1:]):
        assert entry.token_id == prompt[i + 1]
        assert entry.logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-4)
        assert entry.top[0][1] == pytest.approx(expected[i].max().item(), abs=1e-4)
    for i, output in enumerate(outputs):
        (entry,) = output.logprobs
        assert entry.logprob == pytest.approx(expected[len(prompt) - 1 + i, tokens[i]].item(), abs=1e-4)
        assert len(entry.top) == 2
        assert entry.rank == 1


def test_an_aborted_request_leaves_at_once_and_the_others_do_not_notice(tiny_checkpoint):
    core = make_core(tiny_checkpoint("llama"))
    prompts = make_prompts()
    expected = generate(core, prompts[:4])
    for i, prompt in enumerate(prompts[:4]):
        core.add(AddRequest(str(i), prompt, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(4)}
    for step in range(200):
        if step == 5:
            core.abort(["1"])
            core.scheduler.check()
            assert "1" not in core.scheduler.requests
        for output in core.step():
            tokens[output.request_id] += output.token_ids
    assert [tokens[str(i)] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert len(tokens["1"]) < NUM_TOKENS


def test_a_request_runs_to_the_very_end_of_the_context(tiny_checkpoint):
    core = make_core(tiny_checkpoint("llama"), max_model_len=32)
    (tokens,) = generate(core, [[5] * 20], max_tokens=100)
    assert len(tokens) == 12


class PaddedRuns(Graphs):
    """Takes the place of captured graphs: the same padding of every batch, without a GPU."""

    def __init__(self, body, idle_inputs, sizes, device, shared=None, full_size=None):
        self.runs: list[int] = []  # the size of each
        super().__init__(body, idle_inputs, sizes, device, shared, full_size)

    def _capture(self, size):
        self._body(torch.from_numpy(self._idle_inputs(size)), size)

    def seconds(self, size):
        return 1.0

    def run(self, inputs, size):
        assert size in self.sizes
        self.runs.append(size)
        return self._body(torch.from_numpy(inputs), size)


def test_the_last_token_of_a_prompt_that_the_same_step_computes_is_no_decode(tiny_checkpoint, monkeypatch):
    """A decode may be given its context before what came just before has ended."""
    core, batches = make_core(tiny_checkpoint("llama")), []
    forward = core.worker.model.forward
    monkeypatch.setattr(core.worker.model, "forward", lambda batch: batches.append(batch) or forward(batch))
    params, prompt = SamplingParams(temperature=0.0, max_tokens=3), list(range(3, 36))
    core.add(AddRequest("running", [5, 6, 7], params))
    core.step()
    for name in ("first", "second"):
        core.add(AddRequest(name, prompt, params))
    core.step()
    assert batches[-1].query_start.diff().tolist() == [1, 33, 1]
    assert batches[-1].context_lens.tolist() == [4, 33, 33]
    assert batches[-1].num_decodes == 1


def test_a_new_request_is_no_decode_though_every_request_of_the_step_has_one_token(tiny_checkpoint, monkeypatch):
    """The last token of one prompt fills a block, which the next prompt finds while it is on its way."""
    core, batches = make_core(tiny_checkpoint("llama"), max_num_batched_tokens=31), []
    forward = core.worker.model.forward
    monkeypatch.setattr(core.worker.model, "forward", lambda batch: batches.append(batch) or forward(batch))
    params, prompt = SamplingParams(temperature=0.0, max_tokens=3), list(range(3, 35))
    core.add(AddRequest("first", prompt, params))
    core.step()
    core.add(AddRequest("second", [*prompt, 7], params))
    core.step()
    assert batches[-1].query_start.diff().tolist() == [1, 1]
    assert batches[-1].context_lens.tolist() == [32, 33]
    assert batches[-1].num_decodes == 1


def test_a_request_draws_as_it_asks_whoever_had_its_row_before(tiny_checkpoint):
    """One whose prompt is known takes the best tokens alone, and then beside somebody who samples."""
    core, prompts = make_core(tiny_checkpoint("llama"), max_num_seqs=2), [list(range(3, 35)), [5, 6, 7]]
    greedy = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    hot = greedy | {"temperature": 100.0, "seed": 1}
    expected = [generate(core, prompts, **greedy)[0], generate(core, prompts, **hot)[1]]
    core.add(AddRequest("0", prompts[0], SamplingParams(**greedy)))
    outputs = [*core.step(), *core.step()]
    core.add(AddRequest("1", prompts[1], SamplingParams(**hot)))
    outputs += run(core)
    tokens = [[token for each in outputs if each.request_id == name for token in each.token_ids] for name in "01"]
    assert tokens == expected


def test_padded_batches_draw_the_same_tokens(tiny_checkpoint, monkeypatch):
    folder = tiny_checkpoint("llama")
    options = {"max_num_batched_tokens": 40, "max_prefill_chunk": 30, "kv_cache_memory": 3 << 15}
    core = make_core(folder, **options)
    monkeypatch.setattr(model_runner, "Graphs", PaddedRuns)
    core.worker.runner.capture_graphs(40)
    assert generate(core, make_prompts()) == generate(make_core(folder), make_prompts())
    assert core.worker.runner.decode_graphs.runs
    assert core.worker.runner.mixed_graphs.runs
    assert core.stats.num_preemptions > 0


def make_padded_core(folder: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    """Its decodes have graphs of 1, 4 and 16 requests; those of 2 and 8 are left."""
    core = make_core(folder, max_num_seqs=16)
    monkeypatch.setattr(model_runner, "Graphs", PaddedRuns)
    core.worker.runner.capture_graphs(64)
    return core


def test_sizes_that_are_captured_later_are_used_from_then_on(tiny_checkpoint, monkeypatch):
    folder, prompts = tiny_checkpoint("llama"), make_prompts()[:7]
    core, expected = make_padded_core(folder, monkeypatch), generate(make_core(folder), prompts)
    runs = core.worker.runner.decode_graphs.runs
    assert generate(core, prompts) == expected
    assert set(runs) == {16}
    while core.capture_next():
        pass
    runs.clear()
    assert generate(core, prompts) == expected
    assert set(runs) == {8}


def test_an_engine_that_is_never_idle_captures_what_its_steps_want_first(tiny_checkpoint, monkeypatch):
    folder, prompts = tiny_checkpoint("llama"), make_prompts()[:7]
    core = make_padded_core(folder, monkeypatch)
    graphs = core.worker.runner.decode_graphs
    expected = generate(make_core(folder), prompts, max_tokens=STEPS_PER_CAPTURE + 8)
    assert generate(core, prompts, max_tokens=STEPS_PER_CAPTURE + 8) == expected
    assert graphs.waiting == [2]
    assert graphs.runs[0] == 16
    assert graphs.runs[-1] == 8


def test_the_largest_step_has_a_graph_for_prompts_that_fill_it_and_for_no_others(tiny_checkpoint, monkeypatch):
    folder = tiny_checkpoint("llama")
    core = make_core(folder, max_num_batched_tokens=80, max_model_len=256)
    monkeypatch.setattr(model_runner, "Graphs", PaddedRuns)
    monkeypatch.setattr(model_runner, "mixed_sizes", lambda most, run: [16, 32])
    core.worker.runner.capture_graphs(80)
    while core.capture_next():
        pass
    prompts = [[3 + i % 7 for i in range(80 + 80 + 70)], [5] * 70, [5, 6, 7]]
    assert [generate(core, [prompt])[0] for prompt in prompts] == generate(make_core(folder), prompts)
    assert core.worker.runner.mixed_graphs.runs == [80, 80, 16]


@pytest.mark.parametrize(
    ("fixed_ms", "per_token_us", "expected"),
    [(0.7, 22.7, 2048), (4.2, 22.9, 4096), (0.5, 13.0, 3584), (0.4, 2.5, 8192), (0.0, 900.0, 512)],
)
def test_a_chunk_is_what_a_pause_has_time_for_or_what_a_step_is_worth(fixed_ms, per_token_us, expected):
    """Llama 3.1 8B in bf16, in int4 (whose weights each step makes wide) and in fp8, Qwen3 0.6B, and a slow GPU."""
    assert prefill_chunk(fixed_ms / 1e3, per_token_us / 1e6, 8192) == expected


def test_what_a_step_takes_is_told_by_two_of_its_graphs():
    class Timed(PaddedRuns):
        def seconds(self, size: int) -> float:
            return 0.004 + 2e-5 * size

    def make(sizes: list[int]) -> Graphs:
        return Timed(lambda inputs, size: None, lambda size: np.zeros(1), sizes, torch.device("cpu"))

    assert make([256, 1024, 4096]).pace() == (pytest.approx(0.004), pytest.approx(2e-5))
    assert make([256, 1024, 1152]).pace() == (0.0, pytest.approx(0.02448 / 1024))
    assert make([16, 256]).pace() == (0.0, pytest.approx(0.00912 / 256))


def test_an_engine_without_memory_for_more_graphs_does_with_those_it_has(tiny_checkpoint, monkeypatch):
    folder, prompts = tiny_checkpoint("llama"), make_prompts()
    core = make_padded_core(folder, monkeypatch)

    def fail(self: Graphs, size: int) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PaddedRuns, "_capture", fail)
    while core.capture_next():
        pass
    assert core.worker.runner.decode_graphs.sizes == [1, 4, 16]
    assert generate(core, prompts) == generate(make_core(folder), prompts)


def test_two_steps_in_flight_draw_the_same_tokens(tiny_checkpoint):
    """On a CPU nothing overlaps, but the bookkeeping is that of a GPU."""
    folder = tiny_checkpoint("llama")
    core = make_core(folder, max_num_batched_tokens=24, max_prefill_chunk=9)
    core.max_in_flight = 2
    assert generate(core, make_prompts()) == generate(make_core(folder), make_prompts())


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}, {"max_in_flight": 2}, {"padded": True}], ids=str)
def test_blocks_that_have_been_with_the_host_give_the_same_tokens(tiny_checkpoint, monkeypatch, options: dict):
    folder, options = tiny_checkpoint("llama"), dict(options)
    depth, is_padded = options.pop("max_in_flight", 1), options.pop("padded", False)
    monkeypatch.setattr(HostCache, "seconds_per_block", lambda self: 0.0)
    small = {"max_num_batched_tokens": 40, "max_prefill_chunk": 30, "max_model_len": 96}
    whole = make_core(folder, **options)
    block_bytes = (1 << 20) // whole.ready.num_blocks
    cramped = make_core(folder, **small, **options, kv_cache_memory=8 * block_bytes, host_kv_memory=1 << 20)
    cramped.max_in_flight = depth
    cramped.scheduler.host_tier.min_paged_in = 1
    if is_padded:
        monkeypatch.setattr(model_runner, "Graphs", PaddedRuns)
        cramped.worker.runner.capture_graphs(40)
    prompts = make_prompts()
    expected = generate(whole, prompts)
    assert generate(cramped, prompts) == expected
    assert generate(cramped, prompts) == expected
    assert cramped.stats.num_preemptions > 0
    assert cramped.stats.num_blocks_paged_in > 10


def test_where_copies_take_longer_than_computing_the_host_keeps_nothing(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(HostCache, "seconds_per_block", lambda self: 60.0)
    core = make_core(tiny_checkpoint("llama"), host_kv_memory=1 << 20)
    assert core.stats.num_host_blocks == 0
    assert "--host-kv-memory is not used: 16 tokens take 60,000,000 us" in capsys.readouterr().err


def test_an_fp8_cache_holds_twice_the_tokens_and_changes_little(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    whole, narrow = make_core(folder), make_core(folder, kv_cache_dtype="fp8")
    assert narrow.ready.num_blocks == 4 * whole.ready.num_blocks  # float32 here
    prompt = make_prompts()[6]

    def first_logprobs(core: EngineCore) -> torch.Tensor:
        core.add(AddRequest("r", prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=20, prompt_logprobs=0)))
        (output,) = run(core)
        return torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:]])

    exact, close = first_logprobs(whole), first_logprobs(narrow)
    assert not torch.equal(exact, close)
    assert (exact - close).abs().max() < 0.1  # e4m3 keeps 3 bits: single keys and values are off by up to 6 %


def test_batch_invariance_is_refused_where_there_is_none(tiny_checkpoint):
    with pytest.raises(UserError, match=r"--batch-invariant needs a Hopper GPU"):
        make_core(tiny_checkpoint("llama"), batch_invariant=True)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9},
        {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 1.0, "seed": 7, "min_tokens": 15, "stop_token_ids": list(range(64)), "logprobs": 2},
    ],
    ids=["greedy", "seeded", "penalties", "stops"],
)
@pytest.mark.parametrize("num_given", [1, 15, 16, 18])
def test_a_request_goes_on_where_another_engine_left_it(tiny_checkpoint, params: dict, num_given: int):
    folder = tiny_checkpoint("llama")
    sampling = SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True} | params)
    request = AddRequest("a", list(range(5, 25)), sampling)

    def outputs(given: list[int]) -> list[TokenOutput]:
        core = make_core(folder)
        core.add(msgspec.structs.replace(request, output_token_ids=given))
        return list(run(core))

    whole = outputs([])
    tokens = [token for output in whole for token in output.token_ids]
    num_given = min(num_given, len(tokens) - 1)
    rest = outputs(tokens[:num_given])

    assert [token for output in rest for token in output.token_ids] == tokens[num_given:]
    assert rest[-1].finish_reason == whole[-1].finish_reason
    for before, after in zip(whole[num_given:], rest, strict=True):
        assert [each.token_id for each in before.logprobs or []] == [each.token_id for each in after.logprobs or []]
