"""A few steps seen from the GPU: a Chrome trace, how long the GPU was idle, and where the time went.

Kernels may overlap (one starts while the one before it ends), so a kernel's time is what it added: from the end of
everything before it, or its own start if that is later, to its end. With the idle time these add up to the whole.
"""

import gzip
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.core import EngineCore

WARM_UP_STEPS = 4  # traced and thrown away: the profiler's own start-up disturbs them
# What a kernel does, by its name. Matrix products are told apart by what comes before and after them.
PRODUCT = "product"
KERNELS = (
    ("attention", r"^(decode|combine|prefill|paged_attention)"),
    ("norm", r"rms_norm"),
    ("rotary and KV write", r"rotate"),
    ("rounding", r"^round_|^gated_.*_rounded$"),  # of a product's inputs to 8 bits, with the activation that makes them
    ("widening", r"^widen"),  # of weights of few bits, for a product of 16 bits
    ("activation", r"gated_(silu|gelu|activation)"),
    ("sampling", r"argmax|take_best|sample|gumbel|logprobs"),
    (PRODUCT, r"few_rows|many_rows|nvjet|gemm|gemv|cutlass|splitK|linear$|^logits"),
)
COPY, OTHER = "copy", "other"
ANYWHERE = (PRODUCT, "rounding", "widening", COPY, OTHER)  # between any two of the rest, which tell the products apart
SPLIT_K_SUM = r"^splitK"  # adds up what the blocks of the product before it made of their shares of the inputs


@dataclass(frozen=True)
class Kernel:
    """One launch on a GPU, or one call of an op on a CPU. Times in microseconds."""

    name: str
    start: float
    end: float


@dataclass
class Share:
    """What one part of the model takes of a step."""

    part: str
    us: float = 0.0  # a step
    launches: float = 0.0  # a step
    floor_us: float | None = None
    kernels: list[str] = field(default_factory=list)


def record(core: EngineCore, num_steps: int, path: Path | None) -> list[Kernel]:
    """The kernels of about `num_steps` steps, after the warm-up. The trace is kept at `path` (.json, .json.gz)."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    # Activities of the CPU are left out: noting them down would slow the host, which is part of what is looked at.
    plan = schedule(wait=0, warmup=WARM_UP_STEPS, active=num_steps, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=plan, acc_events=True) as profiler:
        for _ in range(WARM_UP_STEPS + num_steps):
            core.step()
            profiler.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        return read_kernels(path)


def record_window(step: Callable[[], object], num_steps: int, path: Path) -> tuple[float, float]:
    """Trace all that `num_steps` calls of `step` have the GPU do; the time.monotonic()s of its start and end."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    plan = schedule(wait=0, warmup=WARM_UP_STEPS, active=1, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=plan, acc_events=True) as profiler:
        for _ in range(WARM_UP_STEPS):
            step()
            torch.cuda.synchronize()
            profiler.step()
        start = time.monotonic()
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
        end = time.monotonic()
    profiler.export_chrome_trace(str(path))
    return start, end


def read_trace(path: Path) -> dict[str, Any]:
    """A Chrome trace: .json or .json.gz."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return dict(json.loads(text))


def write_trace(values: dict[str, Any], path: Path) -> None:
    text = json.dumps(values).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_calls(calls: list[Kernel], path: Path) -> None:
    """Ops of a CPU, on time.monotonic()'s clock, as a Chrome trace."""
    events = [_event(call.name, "op", call.start, call.end) for call in calls]
    write_trace({"traceEvents": events, "baseTimeNanoseconds": time.time_ns() - time.monotonic_ns()}, path)


def add_stages(spans: list[tuple[str, float, float]], path: Path) -> None:
    """Put the stages of the engine's thread, between time.monotonic()s, into a Chrome trace."""
    values = read_trace(path)
    # Traces count from a moment of their own.
    shift_us = (time.time_ns() - time.monotonic_ns() - values.get("baseTimeNanoseconds", 0)) / 1e3
    stages = [_event(stage, "stage", start * 1e6 + shift_us, end * 1e6 + shift_us) for stage, start, end in spans]
    write_trace(values | {"traceEvents": values["traceEvents"] + stages}, path)


def _event(name: str, category: str, start: float, end: float) -> dict[str, Any]:
    """A span between two microseconds; a thread of its own for each category."""
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": "engine",
        "tid": category,
        "ts": start,
        "dur": end - start,
    }


def read_kernels(path: Path, *, with_copies: bool = False) -> list[Kernel]:
    """The kernels of a Chrome trace, by their start. with_copies: and the copies between host and GPU, named so."""
    kernels = []
    for event in read_trace(path)["traceEvents"]:
        is_copy = with_copies and event.get("cat") in ("gpu_memcpy", "gpu_memset")
        if is_copy or event.get("cat") == "kernel":
            name = COPY if is_copy else _short_name(event["name"])
            kernels.append(Kernel(name, float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    return sorted(kernels, key=lambda kernel: kernel.start)


def whole_steps(kernels: list[Kernel]) -> tuple[list[Kernel], int]:
    """The kernels from the end of one step to the end of another, and how many steps they are.

    A trace begins and ends inside of steps, and each step ends with the kernel that draws the tokens.
    """
    draws = [index for index, kernel in enumerate(kernels) if _kind(kernel.name) == "sampling"]
    ends = [index for index in draws if kernels[index].name == kernels[draws[0]].name]
    assert len(ends) > 1, f"no whole step among {len(kernels)} kernels"
    return kernels[ends[0] + 1 : ends[-1] + 1], len(ends) - 1


def idle_share(kernels: list[Kernel]) -> float:
    """The share of the time from the first kernel's start to the last one's end in which none ran."""
    return 1 - sum(_added_us(kernels)) / _span_us(kernels)


def where_the_time_goes(kernels: list[Kernel], num_steps: int, floor_s: dict[str, float] | None = None) -> list[Share]:
    """The parts of a step, largest first, and at the end the idle time. `floor_s` holds the floors of parts by name."""
    shares: dict[str, Share] = {}
    for kernel, part, us in zip(kernels, _parts(kernels), _added_us(kernels), strict=True):
        share = shares.setdefault(part, Share(part))
        share.us += us / num_steps
        share.launches += 1 / num_steps
        if kernel.name not in share.kernels:
            share.kernels.append(kernel.name)
    for part, floor in (floor_s or {}).items():
        if part in shares:
            shares[part].floor_us = floor * 1e6
    idle = Share("idle", us=_span_us(kernels) / num_steps - sum(share.us for share in shares.values()))
    return [*sorted(shares.values(), key=lambda share: -share.us), idle]


def _span_us(kernels: list[Kernel]) -> float:
    return max(kernel.end for kernel in kernels) - kernels[0].start


def _added_us(kernels: list[Kernel]) -> Iterator[float]:
    """What each kernel adds to the time in which the GPU is busy. `kernels` are sorted by their start."""
    latest = float("-inf")
    for kernel in kernels:
        yield max(0.0, kernel.end - max(kernel.start, latest))
        latest = max(latest, kernel.end)


def _parts(kernels: list[Kernel]) -> list[str]:
    """The part of the model that each kernel belongs to."""
    parts = [_kind(kernel.name) for kernel in kernels]
    others = [index for index, part in enumerate(parts) if part not in ANYWHERE]
    for before, after in pairwise([-1, *others, len(parts)]):
        neighbours = parts[before] if before >= 0 else "", parts[after] if after < len(parts) else ""
        products = [index for index in range(before + 1, after) if parts[index] == PRODUCT]
        names = [kernels[index].name for index in products]
        for index, name in zip(products, _products(*neighbours, names), strict=True):
            parts[index] = name
    return parts


def _kind(name: str) -> str:
    if name == COPY:
        return COPY
    return next((kind for kind, pattern in KERNELS if re.search(pattern, name)), OTHER)


def _products(before: str, after: str, kernels: list[str]) -> list[str]:
    """Which matrix products these kernels between two others are; a product may be several kernels."""
    num = len(kernels)
    if before == "attention":
        return ["o"] * num
    if before == "activation":
        return ["down"] * num
    if before == after == "norm":  # the activation is part of the first, or of the rounding of what it made
        second = next((i for i in range(1, num) if not re.search(SPLIT_K_SUM, kernels[i])), num)
        return ["gate_up"] * second + ["down"] * (num - second)
    return [{"rotary and KV write": "qkv", "activation": "gate_up"}.get(after, "logits")] * num


def _short_name(name: str) -> str:
    """A kernel's name without its return type, namespaces, template arguments and parameters."""
    name = re.sub(r"^void ", "", name)
    if "ArgMax" in name:
        return "argmax"
    return re.sub(r"[<(].*", "", name).split("::")[-1]
