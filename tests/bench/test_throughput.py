"""The offline run: its arithmetic by hand, and a real engine with a tiny model."""

from dataclasses import replace

import pytest

from bench.config import BenchConfig
from bench.run import run_offline, with_baseline
from bench.throughput import Step, decode_steps, measure, throughput_metrics
from bench.workloads import BenchRequest, random_requests
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from tests.conftest import SPOILT_TOKEN


def test_prefill_and_decode_are_told_apart_by_step():
    requests = [BenchRequest(output_len=3, prompt=[1] * 10)] * 2
    steps = [Step(1.0, 20, 2, 32, 20), Step(0.5, 0, 2, 32, 22), Step(0.5, 0, 2, 32, 24), Step(0.0, 0, 0, 0, 0)]

    figures = throughput_metrics(steps, requests, num_preemptions=0)

    assert figures["duration"] == 2.0
    assert figures["output_throughput"] == 3.0
    assert figures["total_token_throughput"] == 13.0
    assert figures["prefill_throughput"] == 20.0
    assert figures["decode_throughput"] == 4.0
    assert figures["kv_waste_perc"] == pytest.approx(100 * (12 + 10 + 8) / 32 / 3)
    assert figures["peak_kv_waste_perc"] == pytest.approx(37.5)


def test_a_model_that_makes_nan_is_not_measured(spoilt_checkpoint):
    core = EngineCore(EngineConfig(model=str(spoilt_checkpoint), device="cpu", kv_cache_memory=1 << 20))
    with pytest.raises(UserError, match="NaN"):
        measure(core, [BenchRequest(output_len=9, prompt=[5, SPOILT_TOKEN])])


def test_a_tiny_model_is_measured_offline_and_against_transformers(tiny_checkpoint):
    engine = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu", max_num_seqs=8, kv_cache_memory=1 << 24)
    options = BenchConfig(
        concurrency=(4,),
        num_prompts=6,
        input_len=24,
        output_len=5,
        range_ratio=0.5,
        offline=True,
        baseline="transformers",
    )
    seen: list[tuple[int, int]] = []

    result = run_offline(engine, options, lambda stage, fraction: None, lambda *progress: seen.append(progress))
    result = with_baseline(result, engine, options)

    figures = result.metrics
    assert figures["completed"] == 6
    assert seen[-1] == (6, figures["total_output_tokens"])
    assert figures["output_throughput"] == pytest.approx(figures["total_output_tokens"] / figures["duration"])
    assert 0 <= figures["kv_waste_perc"] <= figures["peak_kv_waste_perc"] < 100
    assert result.environment["torch"]
    assert result.workload["dtype"] == "float32"
    assert result.floor is None
    assert result.baseline is not None
    assert (result.baseline["dtype"], result.baseline["batch_size"]) == ("float32", 4)
    assert result.baseline["ratio"] == pytest.approx(
        figures["output_throughput"] / result.baseline["output_throughput"]
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_each_step_tells_prompt_tokens_from_decoded_ones_chunked_or_not(tiny_checkpoint, depth: int):
    core = EngineCore(
        EngineConfig(
            model=str(tiny_checkpoint("llama")),
            device="cpu",
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_prefill_chunk=8,
            kv_cache_memory=1 << 24,
        )
    )
    core.max_in_flight = depth
    requests = random_requests(3, input_len=20, output_len=5, vocab_size=512, seed=0)

    steps = measure(core, requests)

    # 32 tokens go to the first prompt and 12 of the second; the rest in steps of 8 tokens, decodes among them.
    prompt_tokens = [step.num_prompt_tokens for step in steps]
    assert prompt_tokens[:3] == [32, 7, 7]
    assert max(prompt_tokens[1:]) == 7
    assert sum(step.num_prompt_tokens for step in steps) == 60
    assert sum(step.num_output_tokens for step in steps) == 15
    full = decode_steps(steps, 3)
    assert full == [step for step in steps if (step.num_prompt_tokens, step.num_output_tokens) == (0, 3)]
    assert len(full) < len(decode_steps(steps, 1) + decode_steps(steps, 2) + full) < len(steps)


def test_requests_whose_prompts_are_cached_decode_as_a_full_batch_from_the_start(tiny_checkpoint):
    core = EngineCore(
        EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu", max_num_seqs=4, kv_cache_memory=1 << 24)
    )
    requests = random_requests(4, input_len=32, output_len=9, vocab_size=512, seed=0)
    measure(core, [replace(request, output_len=1) for request in requests])

    steps = measure(core, requests)

    assert len(decode_steps(steps, 4)) == 8
    assert steps[0].num_prompt_tokens == 4
