"""The offline run: its arithmetic by hand, and a real engine with a tiny model."""

import pytest

from bench.config import BenchConfig
from bench.run import run_offline, with_baseline
from bench.throughput import Step, throughput_metrics
from bench.workloads import BenchRequest
from engine.config import EngineConfig


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


def test_a_tiny_model_is_measured_offline_and_against_transformers(tiny_checkpoint):
    engine = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu", max_num_seqs=8, kv_cache_memory=1 << 24)
    options = BenchConfig(
        concurrency=4, num_prompts=6, input_len=24, output_len=5, range_ratio=0.5, offline=True, baseline="transformers"
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
