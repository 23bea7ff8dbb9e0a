"""Prefill and decode by batch size: the arithmetic by hand, and a real engine with a tiny model."""

import pytest

from bench import latency, report
from bench.config import BenchConfig
from bench.run import run_latency
from bench.throughput import Step
from engine.config import EngineConfig
from engine.errors import UserError


def tiny_engine(path: object) -> EngineConfig:
    return EngineConfig(model=str(path), device="cpu", max_num_seqs=4, kv_cache_memory=1 << 24)


def nothing(*progress: object) -> None:
    pass


def test_a_tiny_model_has_a_row_for_prompts_and_one_for_decoding_at_each_batch_size(tiny_checkpoint):
    options = BenchConfig(offline=True, batch_sizes=(1, 4), input_len=32, output_len=3)

    result = run_latency(tiny_engine(tiny_checkpoint("llama")), options, nothing, nothing)

    rows = result.metrics["rows"]
    assert [(row["test"], row["batch_size"]) for row in rows] == [
        ("pp32", 1),
        ("tg3 @ 32", 1),
        ("pp32", 4),
        ("tg3 @ 32", 4),
    ]
    assert all(row["tokens_per_s"] > 0 and row["ms"] > 0 and row["floor_ms"] is None for row in rows)
    columns, shown = report.batch_table(result)
    assert columns[:5] == ["model", "device", "type", "batch", "test"]
    assert shown[0][1:5] == ["cpu", "float32", 1, "pp32"]
    assert len(report.to_csv(result).splitlines()) == 5


def test_the_first_repetition_does_not_count_and_the_others_have_a_mean_and_a_spread(monkeypatch, tiny_checkpoint):
    seconds = iter([9.0, 0.5, 1.0, 0.5, 1.0, 0.5])  # of all prompts; the first one warms up

    def measure(core: object, requests: list) -> list[Step]:
        num = len(requests)
        if requests[0].output_len == 1:
            return [Step(next(seconds), num * 10, num, 0, 0)]
        return [Step(0.3, num * 10, num, 0, 0), Step(0.02, 0, num, 0, 0), Step(0.04, 0, num, 0, 0)]

    monkeypatch.setattr("bench.throughput.measure", measure)
    options = BenchConfig(offline=True, batch_sizes=(2,), input_len=10, output_len=2)

    prompts, decodes = run_latency(tiny_engine(tiny_checkpoint("llama")), options, nothing, nothing).metrics["rows"]

    assert prompts["tokens_per_s"] == pytest.approx((40 * 3 + 20 * 2) / 5)
    assert prompts["std_tokens_per_s"] == pytest.approx((((40 - 32) ** 2 * 3 + (20 - 32) ** 2 * 2) / 4) ** 0.5)
    assert prompts["ms"] == pytest.approx(700)
    assert (decodes["ms"], decodes["tokens_per_s"]) == (pytest.approx(30), pytest.approx(2 / 0.03))
    assert decodes["std_tokens_per_s"] == 0
    assert latency.REPEATS == 5


def test_a_batch_that_does_not_run_at_once_is_refused_with_the_limit(tiny_checkpoint):
    options = BenchConfig(offline=True, batch_sizes=(8,), input_len=16, output_len=3)

    with pytest.raises(UserError, match=r"batch size 8: .* --max-num-seqs \(4\)"):
        run_latency(tiny_engine(tiny_checkpoint("llama")), options, nothing, nothing)


def test_lengths_beyond_the_model_are_refused(tiny_checkpoint):
    options = BenchConfig(offline=True, batch_sizes=(1,), input_len=500, output_len=12)

    with pytest.raises(UserError, match="--input-len 500"):
        run_latency(tiny_engine(tiny_checkpoint("llama")), options, nothing, nothing)
