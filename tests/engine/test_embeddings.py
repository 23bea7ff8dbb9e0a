"""Embeddings against transformers' hidden states in float64, however the engine comes to them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine import model_runner
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.embeddings import finish_embedding
from engine.errors import InvalidEmbeddingError
from engine.llm import LLM
from engine.messages import AddRequest, TokenOutput
from engine.sampling_params import Pooling, SamplingParams, pooling_params
from tests.conftest import SPOILT_TOKEN
from tests.engine.test_core import PaddedRuns, make_prompts

POOLINGS: list[Pooling] = ["last", "mean"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
CRAMPED = {"max_num_batched_tokens": 24, "max_prefill_chunk": 9, "max_model_len": 96, "kv_cache_memory": 1 << 17}


def make_core(folder: Path, **options) -> EngineCore:
    defaults = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 20, "max_num_seqs": 4}
    return EngineCore(EngineConfig(model=str(folder), **(defaults | options)))


def run(core: EngineCore, requests: list[AddRequest]) -> Iterator[TokenOutput]:
    for request in requests:
        core.add(request)
    while core.has_work:
        yield from core.step()
        core.scheduler.check()


def embed(core: EngineCore, prompts: list[list[int]], pooling: Pooling) -> np.ndarray:
    """Vectors [len(prompts), hidden_size]."""
    requests = [AddRequest(str(i), prompt, pooling_params(pooling)) for i, prompt in enumerate(prompts)]
    outputs = sorted(run(core, requests), key=lambda output: int(output.request_id))
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [([], "stop")] * len(prompts)
    return np.stack([np.frombuffer(output.embedding, "<f4") for output in outputs])


def tokens_of(outputs: Iterable[TokenOutput]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for output in outputs:
        if output.embedding is None:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def hidden_states(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers' model ends with before its head, [len(prompt), hidden_size] float64 of each prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.inference_mode():
        return [model.model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]


def pooled(states: list[torch.Tensor], pooling: Pooling) -> np.ndarray:
    return torch.stack([each[-1] if pooling == "last" else each.mean(0) for each in states]).numpy()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_embeddings_equal_the_hidden_states_of_transformers(tiny_checkpoint, family: str):
    """Whole prompts, and chunks of them beside others that find their blocks."""
    folder, prompts = tiny_checkpoint(family), make_prompts()
    states = hidden_states(folder, prompts)
    for options in ({"max_num_seqs": 16}, CRAMPED):
        core = make_core(folder, **options)
        for pooling in POOLINGS:
            expected = pooled(states, pooling)
            np.testing.assert_allclose(embed(core, prompts, pooling), expected, rtol=2e-4, atol=2e-4 * expected.std())
    assert core.stats.prefix_cache_hits > 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_that_is_preempted_halfway_gives_the_same_vector(tiny_checkpoint, monkeypatch, pooling, depth: int):
    """Three answers grow into its blocks: it is summed up from its start again, and not twice."""
    folder, prompt = tiny_checkpoint("llama"), make_prompts()[6]
    answers = [AddRequest(str(i), [7 + i] * 12, GREEDY) for i in range(3)]
    alone = tokens_of(run(make_core(folder), answers))
    expected = embed(make_core(folder), [prompt], pooling)[0]

    core, preempted = make_core(folder, **CRAMPED | {"kv_cache_memory": 8 << 13}), []  # 8 blocks
    core.max_in_flight = depth
    preempt = core.scheduler._preempt
    monkeypatch.setattr(
        core.scheduler, "_preempt", lambda request: preempted.append(request.num_computed_tokens) or preempt(request)
    )
    outputs = list(run(core, [*answers, AddRequest("vector", prompt, pooling_params(pooling))]))
    (vector,) = [np.frombuffer(output.embedding, "<f4") for output in outputs if output.embedding is not None]
    assert any(0 < num_computed < len(prompt) for num_computed in preempted)
    assert tokens_of(outputs) == alone
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-4 * expected.std())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_batches_give_the_same_vectors(tiny_checkpoint, monkeypatch, pooling: Pooling):
    """As CUDA graphs run them."""
    folder, prompts = tiny_checkpoint("llama"), make_prompts()
    core = make_core(folder, max_num_batched_tokens=16, max_prefill_chunk=16)
    monkeypatch.setattr(model_runner, "Graphs", PaddedRuns)
    core.worker.runner.capture_graphs(16)
    expected = embed(make_core(folder), prompts, pooling)
    np.testing.assert_allclose(embed(core, prompts, pooling), expected, rtol=1e-4, atol=1e-4 * expected.std())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_last_token_of_a_prompt_is_no_decode_though_it_comes_alone(tiny_checkpoint, pooling: Pooling):
    folder, prompt = tiny_checkpoint("llama"), make_prompts()[4]
    core = make_core(folder, max_num_batched_tokens=16, max_prefill_chunk=16)
    assert len(prompt) == 17
    (whole,), (chunked,) = embed(make_core(folder), [prompt], pooling), embed(core, [prompt], pooling)
    np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-4 * whole.std())


def test_an_embedded_prompt_is_found_by_others_and_leaves_nothing_else(tiny_checkpoint):
    core, prompt = make_core(tiny_checkpoint("llama")), make_prompts()[6]
    for _ in range(2):
        embed(core, [prompt], "mean")  # every position must be computed
        assert core.stats.prefix_cache_hits == 0
    (output,) = run(core, [AddRequest("again", prompt, pooling_params("last"))])
    assert output.num_cached_tokens == len(prompt) // 16 * 16
    assert core.stats.num_blocks_used == core.stats.generation_tokens == 0
    assert core.stats.prompt_tokens == 3 * len(prompt)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_ends_the_prompt_that_has_it_alone(spoilt_checkpoint, pooling: Pooling):
    core = make_core(spoilt_checkpoint)
    prompts = [[5, 6, 7], [5, SPOILT_TOKEN, 6], [7, 6, 5]]
    outputs = list(run(core, [AddRequest(str(i), prompt, pooling_params(pooling)) for i, prompt in enumerate(prompts)]))
    assert {output.request_id: output.finish_reason for output in outputs} == {"0": "stop", "1": "error", "2": "stop"}


def test_parameters_of_a_vector_are_checked_when_made():
    with pytest.raises(ValueError, match="pooling must be last or mean, for one sequence with max_tokens = 1, got 'cl"):
        SamplingParams(pooling="cls", max_tokens=1)
    with pytest.raises(ValueError, match="pooling must be last or mean"):
        SamplingParams(pooling="last", n=2, max_tokens=1)


def test_a_vector_is_cut_before_its_length_becomes_one():
    raw = np.array([3, 4, 12], "<f4").tobytes()
    assert finish_embedding(raw, dimensions=None, normalize=False).tolist() == [3, 4, 12]
    np.testing.assert_allclose(finish_embedding(raw, dimensions=2, normalize=True), [0.6, 0.8])
    assert finish_embedding(bytes(8), dimensions=None, normalize=True).tolist() == [0, 0]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint) -> LLM:
    return LLM(str(tiny_checkpoint("llama")), device="cpu", dtype="float32", kv_cache_memory=1 << 20)


def test_offline_embeddings_come_in_order_with_their_prompts(llm: LLM, tiny_checkpoint):
    prompts = ["hello world", "def f(x):", "the"]
    states = hidden_states(tiny_checkpoint("llama"), [llm.tokenizer.encode(prompt) for prompt in prompts])
    for pooling in POOLINGS:
        expected = pooled(states, pooling)
        outputs = llm.embed(prompts, pooling=pooling, use_tqdm=False)
        assert [output.prompt for output in outputs] == prompts
        vectors = np.array([output.outputs.embedding for output in outputs])
        np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    (raw,) = llm.embed({"prompt_token_ids": [5, 6]}, normalize=False, dimensions=7, use_tqdm=False)
    assert len(raw.outputs.embedding) == 7
    assert llm.embed([]) == []
    with pytest.raises(ValueError, match="dimensions must be between 1 and 64, the model's hidden size, got 65"):
        llm.embed("hello", dimensions=65)


def test_offline_nan_is_an_error_that_says_so(spoilt_checkpoint):
    llm = LLM(str(spoilt_checkpoint), device="cpu", dtype="float32", kv_cache_memory=1 << 20)
    with pytest.raises(InvalidEmbeddingError, match="NaN"):
        llm.embed({"prompt_token_ids": [SPOILT_TOKEN]}, use_tqdm=False)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (None, "last"),
        ('{"pooling_mode_mean_tokens": true}', "mean"),
        ('{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}', "last"),
        ('{"pooling_mode": "mean"}', "mean"),
    ],
)
def test_the_models_own_pooling_is_the_default(tiny_checkpoint, tmp_path, config: str | None, pooling: Pooling):
    from engine.model_config import ModelConfig

    (tmp_path / "config.json").write_bytes((tiny_checkpoint("llama") / "config.json").read_bytes())
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(config)
    assert ModelConfig.from_path(tmp_path).default_pooling == pooling
