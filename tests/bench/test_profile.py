"""Where a step's time goes: with windows made by hand, and with a tiny model on this CPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ceilings import Ceilings
from bench.closed_loop import ClosedLoop
from bench.config import ProfileConfig
from bench.op_times import timed_ops
from bench.profile import GLUE, IDLE, Window, find_parts, look_into, profile
from bench.profile_report import Report, part_table, sentences, stage_table, to_result
from bench.trace import Kernel
from bench.work import ModelWork
from bench.workloads import BenchRequest
from engine import ops
from engine.batch import ScheduledRequest
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_config import ModelConfig

CEILINGS = Ceilings(read_bytes_per_s=1e9, copied_bytes_per_s=1e9, flops_per_s=1e12)
NUM_LAYERS = 2  # of the tiny model
LAYER = [
    "add_rms_norm",
    "linear",
    "rotate_and_store",
    "paged_attention",
    "linear",
    "add_rms_norm",
    "gated_linear",
    "linear",
]


def decode(context: int) -> ScheduledRequest:
    return ScheduledRequest(0, context - 1, 1, True, [])


def tiny_engine(folder: Path, **flags) -> EngineConfig:
    flags = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 20, "max_num_seqs": 8} | flags
    return EngineConfig(model=str(folder), **flags)


def endless(input_len: int, output_len: int) -> Iterator[BenchRequest]:
    while True:
        yield BenchRequest(output_len, list(range(5, 5 + input_len)))


def model_work(folder: Path) -> ModelWork:
    return ModelWork(ModelConfig.from_path(folder), "float32", "float32")


def test_a_gpus_parts_and_its_idle_time_are_the_wall_clock(tiny_checkpoint):
    """Two steps of 50 us: each copies for 5, then 17 kernels of 2 us, one of which overlaps the one before it."""
    names = ["embedding_kernel", *LAYER, *LAYER, "add_rms_norm", "logits", "take_best"]
    kernels = []
    for start in (0.0, 50.0):
        kernels.append(Kernel("copy", start, start + 5))
        kernels += [Kernel(name, start + 5 + 2 * i, start + 7 + 2 * i) for i, name in enumerate(names)]
    window = Window([[decode(9)], [decode(10)]], kernels, seconds=100e-6, stage_seconds={}, is_gpu=True)

    parts = {part.part: part for part in find_parts(window, model_work(tiny_checkpoint("llama")), CEILINGS)}

    us = {name: part.us for name, part in parts.items()}
    assert us == pytest.approx({
        "norm": 10, "qkv": 4, "rotary and KV write": 4, "attention": 4, "o": 4, "gate_up": 4, "down": 4, "logits": 2,
        "sampling": 2, "copy": 5, "other": 2, IDLE: 5,
    })  # fmt: skip
    assert sum(part.share for part in parts.values()) == pytest.approx(1.0)
    assert parts["qkv"].calls == NUM_LAYERS
    assert parts["norm"].calls == 2 * NUM_LAYERS + 1
    # Attention: 9 and 10 tokens of 2 KV heads of 16 numbers of 4 bytes, keys and values; q and results of 64 numbers.
    read = [NUM_LAYERS * 4 * (2 * 2 * 16 * context + 64) for context in (9, 10)]
    written = NUM_LAYERS * 4 * 64
    assert parts["attention"].work is not None
    assert parts["attention"].work.read == sum(read) / 2
    assert parts["attention"].floor_us == pytest.approx((sum(read) / 2 + written) / 1e9 * 1e6)
    assert parts["attention"].ceiling_share == pytest.approx(parts["attention"].floor_us / 4)
    assert parts["copy"].work is None
    assert parts[IDLE].ceiling_share is None


def test_steps_on_a_cpu_are_looked_into_op_by_op(tiny_checkpoint, tmp_path: Path):
    folder = tiny_checkpoint("llama")
    core = EngineCore(tiny_engine(folder))
    loop = ClosedLoop(core, endless(20, 9), concurrency=3, tokenizer=None)

    window = look_into(loop, tmp_path / "trace.json.gz")
    parts = {part.part: part for part in find_parts(window, model_work(folder), CEILINGS)}

    assert {"qkv", "o", "gate_up", "down", "attention", "norm", "logits", "sampling", GLUE, "schedule"} <= set(parts)
    assert [parts[name].calls for name in ("qkv", "down", "attention")] == pytest.approx([NUM_LAYERS] * 3)
    assert 0.98 <= sum(part.share for part in parts.values()) <= 1.001
    assert all(part.us >= 0 for part in parts.values())
    num_drawn = [sum(request.samples for request in batch) for batch in window.batches]
    assert parts["logits"].work is not None
    assert parts["logits"].work.flops == pytest.approx(sum(2 * 64 * 512 * num for num in num_drawn) / len(num_drawn))


def test_a_trace_shows_ops_inside_of_the_stage_they_are_called_in(tiny_checkpoint, tmp_path: Path):
    from bench.trace import read_trace

    core = EngineCore(tiny_engine(tiny_checkpoint("llama")))
    look_into(ClosedLoop(core, endless(20, 9), concurrency=3, tokenizer=None), tmp_path / "trace.json")

    events = read_trace(tmp_path / "trace.json")["traceEvents"]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "forward"]
    attention = [event for event in events if event["name"] == "paged_attention"]
    assert attention
    assert all(any(a <= event["ts"] <= b for a, b in spans) for event in attention)


def test_the_ops_are_themselves_again_afterwards(tiny_checkpoint):
    before = {name: getattr(ops, name) for name in ops.__all__}

    with timed_ops([]):
        assert ops.linear is not before["linear"]

    assert {name: getattr(ops, name) for name in ops.__all__} == before


def test_a_closed_loop_keeps_its_requests_under_way(tiny_checkpoint):
    core = EngineCore(tiny_engine(tiny_checkpoint("llama")))
    loop = ClosedLoop(core, endless(20, 10), concurrency=5, tokenizer=None)

    run = loop.run(seconds=1.0)
    steps = run.steps[5:]

    assert max(step.num_running for step in steps) <= 5
    assert min(step.num_running + step.num_waiting for step in steps) >= 4  # one may have ended in the step
    # The first ones end one after the other, so that no wave of prompts comes back every ten steps.
    assert max(step.num_prompt_tokens for step in run.steps[2:]) <= 2 * 20
    assert run.num_tokens == sum(s.num_output_tokens for s in run.steps) + 20 * round(
        sum(s.num_finished_prompt_tokens for s in run.steps) / 20
    )
    assert sum(run.stage_seconds.values()) == pytest.approx(run.seconds, rel=0.02)


def test_a_loop_is_warm_when_all_first_prompts_are_done(tiny_checkpoint):
    core = EngineCore(tiny_engine(tiny_checkpoint("llama"), max_num_batched_tokens=16))
    loop = ClosedLoop(core, endless(20, 30), concurrency=8, tokenizer=None)

    loop.warm_up(seconds=0.0)

    assert loop.num_started >= 8


def test_a_profile_of_a_tiny_model_adds_up_and_can_be_read_again(tiny_checkpoint):
    options = ProfileConfig(concurrency=4, input_len=16, output_len=8, duration_s=0.3)

    report = Report.of(profile(tiny_engine(tiny_checkpoint("llama")), options, CEILINGS, lambda stage, share: None))
    measured, result = report.profile, json.loads(to_result(report).to_json())

    assert measured.coverage == pytest.approx(1.0, abs=0.02)
    assert sum(part.share for part in measured.parts) == pytest.approx(1.0, abs=0.02)
    assert (result["kind"], result["workload"]["concurrency"]) == ("profile", 4)
    assert len(result["steps"]["time"]) == len(result["steps"]["num_decodes"]) == result["num_steps"]
    assert result["memory_bytes"]["weights"] == pytest.approx(
        4 * (2 * 512 * 64 + NUM_LAYERS * (64 * 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64)
    )
    for columns, rows in (part_table(measured), stage_table(measured)):
        assert all(len(row) == len(columns) for row in rows)
    assert sentences(report)
