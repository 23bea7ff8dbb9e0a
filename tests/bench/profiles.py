"""Profiles made by hand."""

from dataclasses import replace
from typing import Any

from bench.ceilings import Ceilings
from bench.closed_loop import Run, Step
from bench.config import ProfileConfig
from bench.profile import Part, Profile
from bench.work import Work
from engine.config import EngineConfig

STEP = Step(0.0, 64, 0, 64, 0, num_running=64, num_waiting=0, num_preemptions=0, kv_usage=0.3, kv_waste=0.02)


def part(name: str, share: float, bound: str = "bytes", reached: float = 0.8) -> Part:
    us = 10_000 * share
    return Part(name, us, share, 32, Work(us, 0.0, us), floor_us=reached * us, bound=bound)


def make_profile(*parts: Part, device: str = "cuda:0", steps: list[Step] | None = None, **fields: Any) -> Profile:
    run = Run(steps or [STEP, STEP], seconds=1.0, stage_seconds={"schedule": 0.05, "forward": 0.2, "wait": 0.75})
    base = Profile(
        engine=EngineConfig(), options=ProfileConfig(), device=device, dtype="bfloat16", is_quantized=False,
        max_num_seqs=256, ceilings=Ceilings(1e9, 1e9, 1e12), run=run, parts=list(parts), memory={"KV cache": 1 << 30},
        environment={"load_average": 1.0, "cpu_count": 2},
    )  # fmt: skip
    return replace(base, **fields)
