"""The clock that says where the engine's thread spends its time."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from engine import step_clock
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams
from engine.step_clock import STAGES, StepClock


def make_core(folder: Path) -> EngineCore:
    return EngineCore(EngineConfig(model=str(folder), dtype="float32", device="cpu", kv_cache_memory=1 << 20))


def add_request(core: EngineCore, num_tokens: int) -> None:
    core.add(AddRequest("a", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)))


def test_each_stage_gets_the_time_until_the_next(monkeypatch: pytest.MonkeyPatch):
    moments = iter([10.0, 11.0, 13.0, 13.5, 20.0])
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: next(moments))
    clock = StepClock()

    for stage in ("schedule", "forward", "schedule", "idle"):
        clock.enter(stage)

    seconds = {stage: seconds for stage, seconds in clock.seconds.items() if seconds}
    assert seconds == {"idle": 1.0, "schedule": 2.0 + 6.5, "forward": 0.5}


def test_a_step_goes_through_its_stages_without_gaps(tiny_checkpoint):
    core = make_core(tiny_checkpoint("llama"))
    add_request(core, 2)
    core.clock.spans = []
    core.clock.enter("idle")

    core.step()
    core.step()
    core.clock.enter("send")

    stages = [stage for stage, _, _ in core.clock.spans]
    step = ["schedule", "prepare", "forward", "sample", "wait", "update"]
    assert stages[1:] == ["idle", *step, *step]
    assert all(end == start for (_, _, end), (_, start, _) in pairwise(core.clock.spans))
    assert set(core.stats.stage_seconds) == set(STAGES)
    assert core.stats.stage_seconds["forward"] > 0


def test_the_clock_takes_less_than_half_a_percent_of_even_a_tiny_models_step(tiny_checkpoint):
    core = make_core(tiny_checkpoint("llama"))
    add_request(core, 200)

    def seconds_of(call, repeats: int) -> float:
        """The fastest of many: what else runs on this machine can only add to it."""
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return best

    step_s = seconds_of(core.step, 100)
    stages_s = seconds_of(lambda: [core.clock.enter("forward") for _ in range(100)], 100) / 100 * len(STAGES)

    assert stages_s < 0.005 * step_s, f"{stages_s * 1e6:.2f} us of {step_s * 1e6:.0f} us"
