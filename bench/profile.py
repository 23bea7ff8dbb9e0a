"""Where a step's time goes, and what of it the device could do faster.

The engine runs in this process under a steady load. First it is left alone, and its own clock tells the stages of its
thread. Then some steps are looked into: on a GPU by the torch profiler, on a CPU by a clock around each op. What these
steps cannot do without is counted from their batches (work.py), and what the device reaches is measured before anything
else (ceilings.py).
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import trace
from bench.ceilings import GPU_BYTES, Ceilings, measure_ceilings
from bench.closed_loop import ClosedLoop, Run
from bench.config import ProfileConfig
from bench.environment import environment
from bench.floor import num_params
from bench.free_memory import free_memory
from bench.op_times import timed_ops
from bench.run import token_requests
from bench.trace import Kernel
from bench.work import ModelWork, Work
from bench.workloads import BenchRequest, file_requests, random_requests
from engine import kv_cache
from engine.batch import ScheduledRequest
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.hub import resolve_model
from engine.memory import weight_bytes
from engine.model_config import ModelConfig
from engine.quantization.at_load import scheme_of_layers
from engine.step_clock import StepClock
from engine.tokenizer import Tokenizer
from engine.worker import pick_device, pick_dtype

TRACED_STEPS = 40
RAMP_SHARE = 0.25  # of the duration, before it: at least so long
TURNS = 4  # of each of two engines
REQUESTS_AT_A_TIME = 64
MODEL_STAGES = ("forward", "sample")  # in which the ops are called
IDLE = "idle"  # of a GPU
GLUE = "between the ops"  # of a CPU: the embedding, tables, and Python
OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class Window:
    """Some steps looked into."""

    batches: list[list[ScheduledRequest]]
    kernels: list[Kernel]  # of a GPU; on a CPU the ops
    seconds: float
    stage_seconds: dict[str, float]  # of the engine's thread
    is_gpu: bool


@dataclass(frozen=True)
class Part:
    """What one part of a mean step takes, and what it needs at least."""

    part: str
    us: float
    share: float  # of the step's wall clock
    calls: float
    work: Work | None = None
    floor_us: float | None = None
    bound: str = ""  # what limits it: bytes or flops
    names: list[str] = field(default_factory=list)  # kernels or ops

    @property
    def ceiling_share(self) -> float | None:
        """How much of what the device was measured to reach."""
        return self.floor_us / self.us if self.floor_us and self.us else None


@dataclass(frozen=True)
class Profile:
    """All that was measured; `profile_report.py` shows it, and `advice.py` reads it."""

    engine: EngineConfig
    options: ProfileConfig
    device: str
    dtype: str
    is_quantized: bool
    max_num_seqs: int
    ceilings: Ceilings
    run: Run
    parts: list[Part]
    memory: dict[str, float]  # bytes, by what they are for
    environment: dict[str, Any]

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def step_us(self) -> float:
        """Of a step that was looked into."""
        return sum(part.us for part in self.parts)

    @property
    def coverage(self) -> float:
        """How much of the wall clock the stages of the engine's thread add up to."""
        return sum(self.run.stage_seconds.values()) / self.run.seconds

    def share(self, *parts: str) -> float:
        """Of the steps' wall clock."""
        return sum(part.share for part in self.parts if part.part in parts)


def measure_device(engine: EngineConfig) -> Ceilings:
    """What the device reaches with the model's number type; before an engine takes its memory."""
    device = pick_device(engine.device)
    model = ModelConfig.from_path(resolve_model(engine.model, engine.revision))
    dtype = pick_dtype(engine.dtype, model.dtype, device)
    # On a CPU as much as a step reads: where its weights stay in a cache, the cache's rate is the ceiling.
    num_bytes = dtype.itemsize * sum(num_params(model).values())
    ceilings = measure_ceilings(device, dtype, GPU_BYTES if device.type == "cuda" else num_bytes)
    free_memory()
    return ceilings


def profile(engine: EngineConfig, options: ProfileConfig, ceilings: Ceilings, on_progress: OnProgress) -> Profile:
    """Start an engine, load it, watch it. Raises UserError."""
    with loaded_engine(engine, options, on_progress) as loop:
        on_progress("watching", 0.0)
        run = loop.run(options.duration_s)
        on_progress("looking into some steps", 0.0)
        window = look_into(loop, options.trace)
        core = loop.core
        model_work = _model_work(core, engine)
        return Profile(
            engine=engine,
            options=options,
            device=core.ready.device,
            dtype=core.ready.dtype,
            is_quantized=model_work.scheme is not None,
            max_num_seqs=core.worker.max_num_seqs,
            ceilings=ceilings,
            run=run,
            parts=find_parts(window, model_work, ceilings),
            memory=_memory(core, run),
            environment=environment(),
        )


def compare(
    profile: Profile, engine: EngineConfig, options: ProfileConfig, on_progress: OnProgress
) -> tuple[float, float]:
    """The tokens per second of the profiled engine, and of another or under another load.

    On a CPU they take turns, so that what else runs there disturbs both. A GPU's memory holds one of them at a time.
    """
    changed = engine, options
    if profile.is_gpu:
        return profile.run.num_tokens / profile.run.seconds, _rates([changed], on_progress)[0]
    before, after = _rates([(profile.engine, profile.options), changed], on_progress)
    return before, after


def _rates(setups: list[tuple[EngineConfig, ProfileConfig]], on_progress: OnProgress) -> list[float]:
    """Tokens per second of engines that take turns."""
    with contextlib.ExitStack() as stack:
        loops = [stack.enter_context(loaded_engine(*setup, on_progress)) for setup in setups]
        runs: list[list[Run]] = [[] for _ in loops]
        for turn in range(TURNS):
            on_progress("measuring again", turn / TURNS)
            for loop, own, (_, options) in zip(loops, runs, setups, strict=True):
                own.append(loop.run(options.duration_s / TURNS))
    return [sum(run.num_tokens for run in own) / sum(run.seconds for run in own) for own in runs]


@contextlib.contextmanager
def loaded_engine(engine: EngineConfig, options: ProfileConfig, on_progress: OnProgress) -> Iterator[ClosedLoop]:
    """An engine under load, beyond the first prompts."""
    free_memory()  # of an engine before this one, whose last reference may be gone since its end only
    path = resolve_model(engine.model, engine.revision)
    core = EngineCore(replace(engine, model=str(path), skip_tokenizer_init=True), on_progress)
    tokenizer = None if engine.skip_tokenizer_init else Tokenizer.load(engine.tokenizer or str(path))
    requests = _endless_requests(engine, options, path, core.ready.vocab_size)
    loop = ClosedLoop(core, requests, options.concurrency, tokenizer)
    try:
        on_progress("warming up", 0.0)
        loop.warm_up(options.duration_s * RAMP_SHARE)
        yield loop
    finally:
        del core, loop.core


def look_into(loop: ClosedLoop, path: Path | None) -> Window:
    """Some steps under a profiler; their trace goes to `path`."""
    clock, batches = loop.core.clock, list[list[ScheduledRequest]]()

    def step() -> None:
        num_steps = loop.core.stats.num_steps
        while loop.core.stats.num_steps == num_steps:
            loop.step()
        batches.append(loop.core.batch.requests)

    with tempfile.TemporaryDirectory() as folder:
        file = path or Path(folder) / "trace.json"
        is_gpu = loop.core.worker.device.type == "cuda"
        start, end, kernels = (_trace_gpu if is_gpu else _trace_cpu)(step, clock, file)
        spans = [span for span in clock.spans or [] if start <= span[1] and span[2] <= end]
        clock.spans = None
        trace.add_stages(spans, file)
    stage_seconds = dict.fromkeys(clock.seconds, 0.0)
    for stage, began, ended in spans:
        stage_seconds[stage] += ended - began
    return Window(batches[-TRACED_STEPS:], kernels, end - start, stage_seconds, is_gpu)


def _trace_gpu(step: Callable[[], None], clock: StepClock, path: Path) -> tuple[float, float, list[Kernel]]:
    clock.spans = []
    start, end = trace.record_window(step, TRACED_STEPS, path)
    return start, end, trace.read_kernels(path, with_copies=True)


def _trace_cpu(step: Callable[[], None], clock: StepClock, path: Path) -> tuple[float, float, list[Kernel]]:
    calls: list[Kernel] = []
    with timed_ops(calls):
        clock.enter("receive")
        clock.spans = spans = list[tuple[str, float, float]]()
        for _ in range(TRACED_STEPS):
            step()
        clock.enter("receive")
    trace.write_calls(calls, path)
    return spans[0][1], spans[-1][2], calls


def find_parts(window: Window, model_work: ModelWork, ceilings: Ceilings) -> list[Part]:
    """The parts of a mean step, largest first; they add up to its wall clock."""
    num_steps, step_us = len(window.batches), window.seconds / len(window.batches) * 1e6
    works = [model_work.step(batch) for batch in window.batches]
    parts = []
    *shares, _ = trace.where_the_time_goes(window.kernels, num_steps)
    for share in shares:
        own = [work[share.part] for work in works if share.part in work]
        work = sum(own, Work()).scaled(1 / num_steps)
        parts.append(
            Part(
                share.part,
                us=share.us,
                share=share.us / step_us,
                calls=share.launches,
                work=work if own else None,
                floor_us=sum(each.seconds(ceilings) for each in own) / num_steps * 1e6 if own else None,
                bound="bytes" if work.bytes_s(ceilings) >= work.flops_s(ceilings) else "flops",
                names=share.kernels,
            )
        )
    counted_us = sum(part.us for part in parts)
    if window.is_gpu:
        rest = {IDLE: step_us - counted_us}
    else:
        rest = {stage: seconds / num_steps * 1e6 for stage, seconds in window.stage_seconds.items()}
        rest[GLUE] = sum(rest.pop(stage) for stage in MODEL_STAGES) - counted_us
    parts += [Part(name, us, us / step_us, calls=0) for name, us in rest.items() if us]
    return sorted(parts, key=lambda part: -part.us)


def _model_work(core: EngineCore, engine: EngineConfig) -> ModelWork:
    worker, path = core.worker, resolve_model(engine.model, engine.revision)
    scheme = scheme_of_layers(worker.model_config, engine.quantization, path)
    kv_dtype = "fp8" if engine.kv_cache_dtype == "fp8" else core.ready.dtype
    return ModelWork(worker.model_config, core.ready.dtype, kv_dtype, scheme)


def _memory(core: EngineCore, run: Run) -> dict[str, float]:
    """Bytes. Of the KV cache: what requests owned at the most, and what of that held no token in the mean."""
    worker = core.worker
    cache = worker.num_blocks * kv_cache.bytes_per_block(worker.model.attentions, worker.kv_dtype)
    owned = max(step.kv_usage for step in run.steps)
    wasted = sum(step.kv_usage * step.kv_waste for step in run.steps) / len(run.steps)
    memory: dict[str, float] = {
        "weights": weight_bytes(worker.model),
        "KV cache": cache,
        "KV cache: owned by requests, peak": cache * owned,
        "KV cache: owned and empty, mean": cache * wasted,
    }
    if worker.device.type == "cpu":
        return memory | {"this process, resident": psutil.Process().memory_info().rss}
    stats = torch.cuda.memory_stats()
    reserved, allocated = stats["reserved_bytes.all.current"], stats["allocated_bytes.all.current"]
    free, total = torch.cuda.mem_get_info()
    return memory | {
        "activations of the largest step": worker.largest_batch_bytes,
        "CUDA graphs": worker.graph_bytes,
        "fragmentation: reserved, not in use": reserved - allocated,
        "free": free,
        "GPU": total,
    }


def _endless_requests(
    engine: EngineConfig, options: ProfileConfig, path: Path, vocab_size: int
) -> Iterator[BenchRequest]:
    """The same ones for the same seed. A file's prompts come again in the end, and are in the prefix cache then."""
    if options.dataset != "random":
        prompts = file_requests(
            Path(options.dataset), output_len=options.output_len, seed=engine.seed, vocab_size=vocab_size
        )
        yield from itertools.cycle(token_requests(prompts, path, engine))
    lengths = {"input_len": options.input_len, "output_len": options.output_len}
    for seed in itertools.count(engine.seed):
        yield from random_requests(REQUESTS_AT_A_TIME, **lengths, vocab_size=vocab_size, seed=seed)
