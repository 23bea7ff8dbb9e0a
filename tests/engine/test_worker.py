"""What a GPU's worker has done by the time it is ready. Needs a GPU."""

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.llm import LLM
from engine.messages import TokenOutput
from engine.ops import launcher
from engine.ops.compiler import Build
from engine.sampling_params import SamplingParams
from tests.engine.test_core import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ALL_KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={5: 1.0}),
    SamplingParams(n=3, logprobs=4, prompt_logprobs=2),
]

PROMPTS = [{"prompt_token_ids": [7 + i, *range(20, 19 + length)]} for i, length in enumerate((1, 5, 16, 40, 300, 400))]


def make_llm(folder: Path, **options: object) -> LLM:
    memory = {"kv_cache_memory": 16 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    return LLM(str(folder), device="cuda", **(memory | options))


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"kv_cache_dtype": "fp8"}, {"batch_invariant": True}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_no_kernel_is_compiled_while_serving(family, options, tiny_checkpoint, monkeypatch):
    llm = make_llm(tiny_checkpoint(family, dtype="bfloat16"), **options)

    def refuse(build: Build) -> bytes:
        raise AssertionError(f"{build} was not ready")

    monkeypatch.setattr(launcher, "cubin", refuse)
    for params in ALL_KINDS:
        assert len(llm.generate(PROMPTS, params, use_tqdm=False)) == len(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recorded_steps_draw_the_tokens_of_plain_ones(family, tiny_checkpoint):
    """In float32, so that no two logits are as good as equal."""
    folder = tiny_checkpoint(family)
    plain, recorded = make_llm(folder, enforce_eager=True), make_llm(folder)
    for num_prompts in (1, 3, len(PROMPTS)):
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        expected, found = (llm.generate(PROMPTS[:num_prompts], params, use_tqdm=False) for llm in (plain, recorded))
        for a, b in zip(expected, found, strict=True):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_graphs_are_captured_beside_steps_in_flight(tiny_checkpoint):
    """A few are there from the start, and one more comes between any two steps; in float32 as above."""
    folder = tiny_checkpoint("llama")
    options = {"device": "cuda", "kv_cache_memory": 16 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    whole = EngineCore(EngineConfig(model=str(folder), **options))
    core = EngineCore(EngineConfig(model=str(folder), **options), leaves_graphs=True)
    assert not any(graphs.waiting for graphs in whole.worker.runner.graphs)
    num_left = sum(len(graphs.waiting) for graphs in core.worker.runner.graphs)
    few_bytes = core.worker.memory_kept["cuda_graphs"]
    prompts = [prompt["prompt_token_ids"] for prompt in PROMPTS]
    params = {"max_tokens": num_left + 8, "logprobs": 2}
    expected = generate(whole, prompts, **params)
    step, num_captured = core.step, 0

    def capture_and_step() -> list[TokenOutput]:
        nonlocal num_captured
        num_captured += core.capture_next()
        return step()

    core.step = capture_and_step
    assert generate(core, prompts, **params) == expected
    assert num_captured == num_left > 0
    assert core.worker.memory_kept["cuda_graphs"] >= few_bytes > 0
    assert generate(core, prompts, **params) == expected
