"""Steady load on an engine of this process: as many requests under way at any time as were asked for."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.workloads import BenchRequest, begun, check_lengths
from engine.batch import ScheduledBatch
from engine.core import EngineCore
from engine.messages import AddRequest, TokenOutput
from engine.outputs import RequestState
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

DETOKENIZE = "detokenize"  # a stage beside those of the engine's: in a server the API process does it


@dataclass(frozen=True)
class Step:
    """One call of EngineCore.step: what it launched, what came out of it, and the engine's state after it."""

    end: float  # time.monotonic()
    num_decodes: int  # requests that computed one token, all before it cached
    num_prompt_tokens: int  # all other tokens
    num_output_tokens: int
    num_finished_prompt_tokens: int  # of the prompts whose first token came out
    num_running: int
    num_waiting: int
    num_preemptions: int  # since the engine's start
    kv_usage: float  # share of the blocks that requests own
    kv_waste: float  # share of the slots in those that hold no token


@dataclass
class Run:
    """Some time of it."""

    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Of prompts that got their first token, and all tokens drawn."""
        return sum(step.num_output_tokens + step.num_finished_prompt_tokens for step in self.steps)

    @property
    def output_tokens_per_s(self) -> float:
        return sum(step.num_output_tokens for step in self.steps) / self.seconds


class ClosedLoop:
    """Owns the requests under way. With a tokenizer their tokens become text, as they would for a client."""

    def __init__(
        self, core: EngineCore, requests: Iterator[BenchRequest], concurrency: int, tokenizer: Tokenizer | None
    ) -> None:
        self.core, self.requests, self.tokenizer = core, requests, tokenizer
        self.concurrency = concurrency
        self.num_sent = 0
        self.num_started = 0  # those that have their first token
        self._states: dict[str, RequestState] = {}
        core.clock.seconds.setdefault(DETOKENIZE, 0.0)

    def warm_up(self, seconds: float) -> None:
        """At least so long, and until the first requests of all have computed their prompts."""
        self.run(seconds)
        while self.num_started < self.concurrency:
            self.step()

    def run(self, seconds: float) -> Run:
        """Steps of about so many seconds, at least two."""
        clock, run = self.core.clock, Run()
        clock.enter("receive")
        before, start = dict(clock.seconds), time.monotonic()
        while len(run.steps) < 2 or time.monotonic() - start < seconds:
            run.steps.append(self.step())
        clock.enter("receive")
        run.seconds = time.monotonic() - start
        run.stage_seconds = {stage: clock.seconds[stage] - before[stage] for stage in before}
        return run

    def step(self) -> Step:
        core, clock = self.core, self.core.clock
        clock.enter("receive")
        while len(self._states) < self.concurrency:
            self._send()
        num_steps = core.stats.num_steps
        outputs = core.step()
        clock.enter(DETOKENIZE)
        num_prompt_tokens = self._take(outputs)
        stats, launched = core.stats, core.batch if core.stats.num_steps > num_steps else ScheduledBatch([], [])
        return Step(
            end=time.monotonic(),
            num_decodes=launched.num_decodes,
            num_prompt_tokens=launched.num_tokens - launched.num_decodes,
            num_output_tokens=sum(len(output.token_ids) for output in outputs),
            num_finished_prompt_tokens=num_prompt_tokens,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_preemptions=stats.num_preemptions,
            kv_usage=stats.num_blocks_used / stats.num_blocks,
            kv_waste=1 - stats.num_slots_used / stats.num_slots_allocated if stats.num_slots_allocated else 0.0,
        )

    def _send(self) -> None:
        request = next(self.requests)
        prompt = request.prompt
        assert isinstance(prompt, list), "a prompt is token ids here"
        check_lengths([request], self.core.ready.max_model_len)
        if self.num_sent < self.concurrency:
            request = begun(request, self.num_sent, self.concurrency)
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=self.tokenizer is not None,
            seed=self.num_sent,
        )
        message = AddRequest(f"load-{self.num_sent}", prompt, params, arrival_time=time.monotonic())
        self.num_sent += 1
        self._states[message.request_id] = RequestState(message.request_id, None, [message], self.tokenizer)
        self.core.add(message)

    def _take(self, outputs: list[TokenOutput]) -> int:
        """Make text of tokens; the tokens of the prompts whose first one this is."""
        now, num_prompt_tokens = time.monotonic(), 0
        for output in outputs:
            state = self._states[output.request_id]
            if not state.timings.num_output_tokens:
                self.num_started += 1
                num_prompt_tokens += state.timings.num_prompt_tokens
            if state.take(0, output, now).finish_reason is not None:
                del self._states[output.request_id]
        return num_prompt_tokens
