"""Batch throughput without a server: every request at once into an EngineCore of this process.

Nothing stands between the clock and the engine, so its steps can be told apart: those that computed prompt tokens and
those that only decoded.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.workloads import BenchRequest, warm_up_requests
from engine.core import EngineCore
from engine.errors import UserError
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams

WARM_UP_REQUESTS = 16
WARM_UP_TOKENS = 16
PROGRESS_PERIOD_S = 0.1
DEFINITIONS = {
    "throughput": "of all requests, per second from the first one added to the last one finished",
    "prefill throughput": "prompt tokens computed, per second of the steps that computed any (they decode as well)",
    "decode throughput": "tokens generated, per second of the steps that computed no prompt token",
    "KV waste": "token slots in allocated KV blocks that hold no token, as a share of them; mean over steps",
}


@dataclass(frozen=True)
class Step:
    """One step that has ended: what it computed and how long it took."""

    seconds: float  # from the end of the step before
    num_prompt_tokens: int  # computed in it, of prompts and of sequences computed again after a preemption
    num_output_tokens: int
    num_slots_allocated: int
    num_slots_used: int


def measure(
    core: EngineCore, requests: list[BenchRequest], on_progress: Callable[[int, int], None] = lambda done, tokens: None
) -> list[Step]:
    """Run all requests, whose prompts are token ids, to their end. `on_progress` gets finished requests and tokens.

    Raises UserError for a model whose logits are NaN.
    """
    clock = time.perf_counter
    before = reported = clock()
    for index, request in enumerate(requests):
        assert isinstance(request.prompt, list), "offline prompts are token ids"
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=False,
            seed=index,
        )
        core.add(AddRequest(f"bench-{index}", request.prompt, params, arrival_time=time.monotonic()))
    steps: list[Step] = []
    launched: deque[int] = deque()  # tokens of the steps in flight
    started: set[str] = set()  # requests whose prompt is done
    num_done, num_tokens, num_steps = 0, 0, core.stats.num_steps
    while core.has_work:
        outputs, stats = core.step(), core.stats
        now = clock()
        if stats.num_steps > num_steps:
            launched.append(stats.batch_tokens)
            num_steps = stats.num_steps
        if len(launched) == len(core.scheduler.in_flight):
            continue  # launched, and nothing waited for
        num_decoded = num_new = sum(len(output.token_ids) for output in outputs)
        if len(started) < len(requests):  # a decode is one token in and one out; whatever else was computed is prompts
            num_decoded = sum(len(output.token_ids) for output in outputs if output.request_id in started)
            started.update(output.request_id for output in outputs)
        # From the end of the step before, whatever we did in between: a GPU works on meanwhile.
        seconds, before = now - before, now
        num_prompt_tokens = launched.popleft() - num_decoded
        steps.append(Step(seconds, num_prompt_tokens, num_new, stats.num_slots_allocated, stats.num_slots_used))
        num_tokens += num_new
        if any(output.finish_reason == "error" for output in outputs):
            raise UserError("the model's logits are NaN or infinite, and what it makes is no measure of anything")
        num_done += sum(output.finish_reason is not None for output in outputs)
        if now - reported > PROGRESS_PERIOD_S or not core.has_work:
            reported = now
            on_progress(num_done, num_tokens)
    return steps


def decode_steps(steps: list[Step], batch: int) -> list[Step]:
    """The steps that decoded a full batch and computed no prompt."""
    return [step for step in steps if not step.num_prompt_tokens and step.num_output_tokens == batch]


def warm_up(requests: list[BenchRequest]) -> list[BenchRequest]:
    """A few requests of the same shape to run before the clock starts."""
    return warm_up_requests(requests, WARM_UP_REQUESTS, output_len=WARM_UP_TOKENS)


def throughput_metrics(steps: list[Step], requests: list[BenchRequest], num_preemptions: int) -> dict[str, Any]:
    """The figures of an offline run, with the serving run's keys where the meaning is the same."""
    duration = sum(step.seconds for step in steps)
    num_input, num_output = sum(len(request.prompt) for request in requests), sum(s.num_output_tokens for s in steps)
    prefills = [step for step in steps if step.num_prompt_tokens]
    decodes = [step for step in steps if not step.num_prompt_tokens]
    wastes = [100 * (1 - s.num_slots_used / s.num_slots_allocated) for s in steps if s.num_slots_allocated]
    return {
        "duration": duration,
        "completed": len(requests),
        "failed": 0,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(requests) / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "prefill_throughput": _rate(sum(s.num_prompt_tokens for s in prefills), prefills),
        "decode_throughput": _rate(sum(s.num_output_tokens for s in decodes), decodes),
        "num_steps": len(steps),
        "kv_waste_perc": sum(wastes) / len(wastes) if wastes else None,
        "peak_kv_waste_perc": max(wastes, default=None),
        "num_preemptions": num_preemptions,
        "valid": True,
    }


def _rate(count: int, steps: list[Step]) -> float | None:
    seconds = sum(step.seconds for step in steps)
    return count / seconds if seconds else None
