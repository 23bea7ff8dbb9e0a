"""What a profile says in plain sentences: what the bottleneck is, how that is seen, and which flag to try.

Each rule looks at one possible cause and says how much time it could give back at most; the largest comes first.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.profile import GLUE, IDLE, MODEL_STAGES, Part, Profile
from engine.step_clock import STAGES

LAYER_PRODUCTS = ("qkv", "o", "gate_up", "down")
# On a CPU: all that is not the model's own. What of its stages is no op is GLUE.
HOST_STAGES = tuple(stage for stage in STAGES if stage not in ("idle", "wait", *MODEL_STAGES))
LARGE = 0.1  # share of the time that is worth a sentence
FULL = 0.9  # of the KV cache, or of the rows of a batch
FAR = 0.5  # of a ceiling: what reaches less is not bound by it
NOISE = 0.05  # by which two runs of the same may differ
PRICE = "`vcli bench --quality` tells its price"


@dataclass(frozen=True)
class Advice:
    """One finding. `gain`: the share of the time that it could give back at most."""

    bottleneck: str
    evidence: str
    gain: float
    remedy: str = ""  # what to try; empty: nothing that a flag could do
    changes: dict[str, Any] = field(default_factory=dict)  # fields of EngineConfig that do so
    load: dict[str, Any] = field(default_factory=dict)  # fields of ProfileConfig


@dataclass(frozen=True)
class Check:
    """What came of a piece of advice. Both in tokens per second, under the same load."""

    before: float
    after: float

    @property
    def verdict(self) -> str:
        ratio = self.after / self.before
        what = f"{self.before:,.0f} → {self.after:,.0f} tok/s ({ratio - 1:+.0%})"
        if ratio > 1 + NOISE:
            return f"{what}: it helps"
        return f"{what}: it does not help here" if ratio < 1 - NOISE else f"{what}: no difference that could be told"


def in_words(found: list[Advice], checked: Advice | None = None, check: Check | None = None) -> list[str]:
    """Findings line by line, and what came of the one that was tried."""
    lines = []
    for place, advice in enumerate(found):
        head = "The bottleneck is" if place == 0 else "Then"
        lines.append(f"{head} {advice.bottleneck}: {advice.evidence}.")
        if advice.remedy:
            lines.append(f"  Try {advice.remedy}.")
        if advice is checked and check:
            lines.append(f"  Tried: {check.verdict}.")
    return lines or ["Nothing stands out: every part is near what the device can do."]


def advise(profile: Profile) -> list[Advice]:
    """All that is worth saying, the most promising first; each remedy once."""
    found = sorted((advice for rule in RULES for advice in rule(profile)), key=lambda advice: -advice.gain)
    remedies = [advice.remedy for advice in found]
    return [advice for i, advice in enumerate(found) if not advice.remedy or advice.remedy not in remedies[:i]]


def _preemptions(p: Profile) -> Iterator[Advice]:
    steps = p.run.steps
    num = steps[-1].num_preemptions - steps[0].num_preemptions
    num_prompts = sum(step.num_finished_prompt_tokens > 0 for step in steps)
    if not num:
        return
    remedy, changes = _more_cache(p)
    yield Advice(
        f"a KV cache too small for {p.options.concurrency:,} requests at once",
        f"{num:,} times a request gave its blocks up and was computed again, beside {num_prompts:,} steps that ended a "
        f"prompt; the cache was {max(step.kv_usage for step in steps):.0%} full",
        gain=min(0.9, num / max(num + num_prompts, 1)),
        remedy=remedy,
        changes=changes,
    )


def _queue(p: Profile) -> Iterator[Advice]:
    """Requests wait although the engine could run more."""
    waiting = statistics.mean(step.num_waiting for step in p.run.steps)
    running = statistics.mean(step.num_running for step in p.run.steps)
    if waiting < LARGE * (waiting + running):
        return
    seen = f"{waiting:,.0f} requests wait beside {running:,.0f} that run, in the mean"
    gain = waiting / (waiting + running) * 0.5
    if running >= FULL * p.max_num_seqs:
        wanted = min(p.options.concurrency, 4 * p.max_num_seqs)
        yield Advice(
            f"the limit of {p.max_num_seqs:,} requests that may run at once",
            seen,
            gain,
            f"--max-num-seqs {wanted}: a step with more requests takes little longer",
            {"max_num_seqs": wanted},
        )
    elif max(step.kv_usage for step in p.run.steps) >= FULL:
        remedy, changes = _more_cache(p)
        yield Advice("a full KV cache, for whose blocks requests wait", seen, gain, remedy, changes)


def _more_cache(p: Profile) -> tuple[str, dict[str, Any]]:
    if p.is_gpu and p.engine.kv_cache_dtype == "auto":
        return "--kv-cache-dtype fp8: twice the tokens in the same memory", {"kv_cache_dtype": "fp8"}
    size = int(2 * p.memory["KV cache"])
    return f"--kv-cache-memory {size >> 20}MiB, twice what it has, or a lower --max-num-seqs", {"kv_cache_memory": size}


def _host(p: Profile) -> Iterator[Advice]:
    """The GPU waits for the host, or the CPU does other things than the model."""
    idle = p.share(IDLE)
    stages = {stage: seconds / p.run.seconds for stage, seconds in p.run.stage_seconds.items()}
    if p.is_gpu and idle >= LARGE:
        busiest = max((stage for stage in stages if stage not in ("idle", "wait")), key=lambda stage: stages[stage])
        evidence = f"the GPU is idle {idle:.0%} of the time; of the host's, {stages[busiest]:.0%} goes to `{busiest}`"
        if p.engine.enforce_eager:
            remedy = "--no-enforce-eager: a step is then launched as one CUDA graph"
            yield Advice(
                "the host, which launches kernels slower than the GPU runs them",
                evidence,
                idle,
                remedy,
                {"enforce_eager": False},
            )
        else:
            yield Advice("the host, for which the GPU waits", evidence, idle)
    own = {stage: stages.get(stage, 0.0) for stage in HOST_STAGES}
    share = sum(own.values()) + p.share(GLUE)
    if not p.is_gpu and share >= 2 * LARGE:
        busiest = max(own, key=lambda stage: own[stage])
        yield Advice(
            "what is not the model's own work",
            f"{share:.0%}: {p.share(GLUE):.0%} between the ops, and {own[busiest]:.0%} in `{busiest}`",
            share / 2,
        )


def _products(p: Profile) -> Iterator[Advice]:
    """Products of few rows read weights, those of many rows multiply."""
    parts = [part for part in p.parts if part.part in LAYER_PRODUCTS and part.work]
    share = sum(part.share for part in parts)
    if share < LARGE:
        return
    binding, reached = max(parts, key=lambda part: part.us), _reached(parts)
    rows = statistics.mean(step.num_decodes + step.num_prompt_tokens for step in p.run.steps)
    sizes = ", ".join(f"{part.part} {part.share:.0%}" for part in parts)
    evidence = (
        f"{share:.0%} of the time ({sizes}), {_amount(binding.bound, parts)} a step of {rows:,.0f} tokens: "
        f"{reached:.0%} of what the device was seen to reach"
    )
    gain = share * min(reached, 1.0) / 2
    concurrency = 4 * p.options.concurrency
    bottleneck = "the layers' matrix products" if binding.bound == "flops" else "reading the layers' weights"
    if reached < FAR:
        bottleneck = "the layers' matrix products, which do not reach what the device could do"
    if _can_be_fp8(p):
        what = "twice the rate" if binding.bound == "flops" else "half the bytes"
        yield Advice(bottleneck, evidence, gain, f"--quantization fp8: {what} ({PRICE})", {"quantization": "fp8"})
    elif binding.bound == "bytes" and concurrency <= p.max_num_seqs and not any(s.num_waiting for s in p.run.steps):
        remedy = f"more requests at once, say {concurrency}: a step reads the weights once, however many share it"
        yield Advice(bottleneck, evidence, gain, remedy, load={"concurrency": concurrency})
    else:
        yield Advice(bottleneck, evidence, 0.0)


def _can_be_fp8(p: Profile) -> bool:
    """On a CPU few bits save memory, and no time."""
    return p.is_gpu and not p.is_quantized


def _attention(p: Profile) -> Iterator[Advice]:
    part = next((part for part in p.parts if part.part == "attention" and part.share >= 2 * LARGE), None)
    if part is None or part.work is None or part.ceiling_share is None:
        return
    amount = f"{_amount(part.bound, [part])} a step"
    evidence = f"{part.share:.0%} of the time, {amount}: {_reached([part]):.0%} of what the device was seen to reach"
    if part.bound == "bytes" and p.is_gpu and p.engine.kv_cache_dtype == "auto":
        remedy = f"--kv-cache-dtype fp8: half the bytes ({PRICE})"
        gain = part.share * min(part.ceiling_share, 1.0) / 2
        yield Advice("reading keys and values", evidence, gain, remedy, {"kv_cache_dtype": "fp8"})
    elif part.ceiling_share >= FAR:  # else `_kernels` tells it
        yield Advice("attention", evidence, 0.0)


def _kernels(p: Profile) -> Iterator[Advice]:
    """What takes long and is far from every ceiling: no flag mends that, but whoever works on the kernels may."""
    for part in p.parts:
        if part.part in LAYER_PRODUCTS or part.ceiling_share is None:
            continue  # of the products another rule speaks
        if part.share >= LARGE and part.ceiling_share < FAR:
            yield Advice(
                f"`{part.part}`, which does not reach what the device could do",
                f"{part.share:.0%} of the time, at {part.ceiling_share:.0%} of the ceiling for its {part.bound}",
                gain=0.0,
            )


RULES: tuple[Callable[[Profile], Iterator[Advice]], ...] = (
    _preemptions,
    _queue,
    _host,
    _products,
    _attention,
    _kernels,
)


def _reached(parts: list[Part]) -> float:
    """The floors of some parts as a share of what they took."""
    return sum(part.floor_us or 0.0 for part in parts) / sum(part.us for part in parts)


def _amount(bound: str, parts: list[Part]) -> str:
    works = [part.work for part in parts if part.work]
    if bound == "bytes":
        return f"{sum(work.read + work.written for work in works) / 1e6:,.0f} MB"
    return f"{sum(work.flops for work in works) / 1e9:,.0f} GFLOP"
