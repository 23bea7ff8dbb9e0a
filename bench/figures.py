"""What speed is judged by: the workloads, the floor of each figure, the peer's value and our target.

Every figure is a time or a share, and less is better. Workloads are whole or not run: nothing here is shortened.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.floor import H200, Floor, find_ceilings
from bench.workloads import BenchRequest, random_requests, uniform_requests


@dataclass(frozen=True)
class Figure:
    name: str
    unit: str  # "ms", "s" or "%"
    floor_s: Callable[[Floor], float] | None = None

    def floor(self, floor: Floor | None) -> float | None:
        """The floor in the figure's unit; None where there is none."""
        if floor is None or self.floor_s is None:
            return None
        return self.floor_s(floor) * {"s": 1.0, "ms": 1e3}[self.unit]


@dataclass(frozen=True)
class Goal:
    """None: the peer has no such figure, or nothing is aimed at."""

    peer: float | None = None
    target: float | None = None


@dataclass(frozen=True)
class Decode:
    """The mean step of a full batch whose contexts grow from input_len to input_len + output_len tokens."""

    batch: int
    input_len: int = 512
    output_len: int = 128
    kv_cache_dtype: str = "auto"

    @property
    def figure(self) -> Figure:
        suffix = "" if self.kv_cache_dtype == "auto" else f", {self.kv_cache_dtype} KV cache"
        context = self.input_len + self.output_len / 2
        return Figure(f"decode step, batch {self.batch}{suffix}", "ms", lambda f: f.decode_step_s(self.batch, context))


@dataclass(frozen=True)
class Prompt:
    """One prompt alone to its first token: the median of several fresh ones, and of each of them a second time."""

    length: int

    @property
    def first(self) -> Figure:
        return Figure(f"prompt of {self.length:,} tokens", "ms", lambda f: f.prefill_s(self.length))

    @property
    def again(self) -> Figure:
        """All of it is in the prefix cache: the work of a decode step at that context."""
        return Figure(f"prompt of {self.length:,} tokens again", "ms", lambda f: f.decode_step_s(1, self.length))


@dataclass(frozen=True)
class Run:
    """All requests at once into the engine, to the end of the last one."""

    title: str
    make: Callable[[int], list[BenchRequest]]  # from the size of the vocabulary
    max_num_seqs: int = 256

    @property
    def figure(self) -> Figure:
        return Figure(self.title, "s", lambda f: f.run_s(_lengths(self.make(f.model.vocab_size)), self.max_num_seqs))


@dataclass(frozen=True)
class Serving:
    """A closed loop of 512-token prompts and 128-token answers against a server."""

    num_requests: int
    concurrency: int

    @property
    def title(self) -> str:
        return f"serving {self.num_requests} x (512/128), {self.concurrency} at a time"

    def make(self, vocab_size: int) -> list[BenchRequest]:
        return random_requests(
            self.num_requests, input_len=512, output_len=128, vocab_size=vocab_size, seed=1, temperature=1.0
        )

    @property
    def figures(self) -> dict[str, Figure]:
        """By the key in the run's metrics."""
        if self.concurrency == 1:
            step = Figure("serving one client: TPOT p50", "ms", lambda f: f.decode_step_s(1, 576))
            first = Figure("serving one client: TTFT p50", "ms", lambda f: f.prefill_s(512))
            return {"p50_ttft_ms": first, "p50_tpot_ms": step}
        lengths = [(512, 128)] * self.num_requests
        duration = Figure(self.title, "s", lambda f: f.run_s(lengths, self.concurrency))
        parts = [(latency, p) for latency in ("ttft", "itl") for p in (50, 99)]
        return {"duration": duration} | {
            f"p{p}_{latency}_ms": Figure(f"{self.title}: {latency.upper()} p{p}", "ms") for latency, p in parts
        }


DECODES = (Decode(1, 128, 256), *(Decode(batch) for batch in (8, 32, 64, 128, 256)))
FP8_DECODE = Decode(64, kv_cache_dtype="fp8")
PROMPTS = tuple(Prompt(length) for length in (512, 2048, 8192))
# Lengths, seeds and temperatures are the peer's.
LONG_IN = Run(
    "512 x (1,024/128)",
    lambda vocab_size: random_requests(
        512, input_len=1024, output_len=128, vocab_size=vocab_size, seed=0, temperature=1.0
    ),
)
MIXED, MANY_MIXED = (
    Run(
        f"{num:,} x (100-1,024/100-1,024)",
        lambda vocab_size, num=num: uniform_requests(num, low=100, high=1024, seed=0, temperature=0.6),  # type: ignore[misc]
    )
    for num in (256, 1024)
)
RUNS = (LONG_IN, MIXED, MANY_MIXED)
SERVINGS = (Serving(16, 1), Serving(320, 64), Serving(768, 256))
START_FIRST = Figure("process start to first answer, nothing compiled yet", "s")
START_AGAIN = Figure("process start to first answer, again", "s")
IDLE = Figure("GPU idle share, decode at batch 64", "%")
INVARIANT_COST = Figure(f"cost of --batch-invariant, {MIXED.title}", "%")

# Peer: vLLM 0.26.0 with its defaults on one H200 (driver 580.159, torch 2.11, CUDA 13.0, 2026-11-22), the same
# workloads with dummy weights. Targets: ours, for that GPU.
PEER = "vLLM 0.26"
_EVERY_MODEL = {IDLE.name: Goal(target=3.0)}
GOALS: dict[str, dict[str, Goal]] = {
    "llama-3.1-8b": {
        "decode step, batch 1": Goal(4.85, 3.6),
        "decode step, batch 8": Goal(5.08, 3.8),
        "decode step, batch 32": Goal(5.77, 4.4),
        "decode step, batch 64": Goal(6.59, 5.2),
        "decode step, batch 128": Goal(8.40, 6.7),
        "decode step, batch 256": Goal(13.3, 10.8),
        "decode step, batch 64, fp8 KV cache": Goal(),
        "prompt of 512 tokens": Goal(16.8, 12.0),
        "prompt of 2,048 tokens": Goal(52.5, 46.0),
        "prompt of 8,192 tokens": Goal(218.0, 200.0),
        "prompt of 8,192 tokens again": Goal(21.6, 5.0),
        "512 x (1,024/128)": Goal(16.4, 14.3),
        "256 x (100-1,024/100-1,024)": Goal(13.6, 11.0),
        "cost of --batch-invariant, 256 x (100-1,024/100-1,024)": Goal(None, 15.0),
        "serving one client: TTFT p50": Goal(21.8, 14.0),
        "serving one client: TPOT p50": Goal(4.86, 3.7),
        "serving 320 x (512/128), 64 at a time": Goal(8.09, 6.6),
        "serving 320 x (512/128), 64 at a time: TTFT p50": Goal(482.0),
        "serving 320 x (512/128), 64 at a time: TTFT p99": Goal(778.0),
        "serving 320 x (512/128), 64 at a time: ITL p50": Goal(6.56),
        "serving 320 x (512/128), 64 at a time: ITL p99": Goal(141.0, 40.0),
        "serving 768 x (512/128), 256 at a time": Goal(15.5, 12.5),
        "serving 768 x (512/128), 256 at a time: TTFT p50": Goal(1760.0),
        "serving 768 x (512/128), 256 at a time: TTFT p99": Goal(3328.0),
        "serving 768 x (512/128), 256 at a time: ITL p50": Goal(16.5),
        "serving 768 x (512/128), 256 at a time: ITL p99": Goal(200.0, 60.0),
        "process start to first answer, nothing compiled yet": Goal(75.0, 10.0),
        "process start to first answer, again": Goal(66.8, 5.0),
        **_EVERY_MODEL,
    },
    "qwen3-0.6b": {
        "decode step, batch 1": Goal(1.67, 0.6),
        "decode step, batch 8": Goal(2.39, 0.75),
        "decode step, batch 32": Goal(2.54, 1.1),
        "decode step, batch 64": Goal(2.95, 1.6),
        "decode step, batch 128": Goal(5.11, 2.7),
        "decode step, batch 256": Goal(6.82, 4.9),
        "prompt of 8,192 tokens": Goal(47.1, 27.0),
        "prompt of 8,192 tokens again": Goal(27.1, 3.0),
        "512 x (1,024/128)": Goal(3.73, 2.9),
        "256 x (100-1,024/100-1,024)": Goal(5.52, 3.9),
        "1,024 x (100-1,024/100-1,024)": Goal(28.9, 18.0),
        "serving one client: TTFT p50": Goal(19.9, 6.0),
        "serving one client: TPOT p50": Goal(2.16, 0.75),
        "serving 320 x (512/128), 64 at a time": Goal(3.26, 2.1),
        "serving 320 x (512/128), 64 at a time: TTFT p50": Goal(178.0),
        "serving 320 x (512/128), 64 at a time: TTFT p99": Goal(230.0),
        "serving 320 x (512/128), 64 at a time: ITL p50": Goal(3.83),
        "serving 320 x (512/128), 64 at a time: ITL p99": Goal(20.6),
        "serving 768 x (512/128), 256 at a time": Goal(7.70, 4.6),
        "serving 768 x (512/128), 256 at a time: TTFT p50": Goal(547.0),
        "serving 768 x (512/128), 256 at a time: TTFT p99": Goal(1045.0),
        "serving 768 x (512/128), 256 at a time: ITL p50": Goal(13.9),
        "serving 768 x (512/128), 256 at a time: ITL p99": Goal(44.2),
        "process start to first answer, nothing compiled yet": Goal(80.0, 8.0),
        "process start to first answer, again": Goal(None, 4.0),
        **_EVERY_MODEL,
    },
    # The peer's better one of Machete and Marlin.
    "llama-3.1-8b-gptq-int4": {
        "decode step, batch 1": Goal(3.30, 1.5),
        "decode step, batch 8": Goal(),
        "decode step, batch 32": Goal(),
        "decode step, batch 64": Goal(6.5, 3.6),
        "decode step, batch 128": Goal(),
        "decode step, batch 256": Goal(13.5, 11.0),
        "prompt of 8,192 tokens": Goal(232.0, 210.0),
        "512 x (1,024/128)": Goal(17.4, 15.0),
        IDLE.name: Goal(),
    },
    "llama-3.1-8b-fp8": {
        "decode step, batch 1": Goal(3.47, 2.2),
        "decode step, batch 8": Goal(),
        "decode step, batch 32": Goal(),
        "decode step, batch 64": Goal(5.11, 3.5),
        "decode step, batch 128": Goal(),
        "decode step, batch 256": Goal(11.1, 8.3),
        "prompt of 8,192 tokens": Goal(152.0, 120.0),
        "512 x (1,024/128)": Goal(11.5, 9.7),
        IDLE.name: Goal(),
    },
}


@dataclass(frozen=True)
class Roofline:
    """A case of bench/kernels.py that is to reach a share of a rate: of the peer's, or else of the ceiling."""

    op: str
    shape: str
    share: float
    counts: str  # what the rates are of: "bytes" or "flops", a second
    floor_rate: float  # the measured ceiling
    peer_rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"

    def floor_us(self, work: float) -> float:
        """`work`: the case's bytes or FLOPs."""
        return work / self.floor_rate * 1e6

    def goal(self, work: float) -> Goal:
        peer = work / self.peer_rate * 1e6 if self.peer_rate else None
        return Goal(peer, (peer or self.floor_us(work)) / self.share)


# Copies of 8 GB on an H200, read and written, and FlashAttention-3's forward pass at this length there.
COPY_BYTES_PER_S, FLASH_ATTENTION_FLOPS_PER_S = 4.27e12, 600e12
ROOFLINES = (
    Roofline("decode", "64 x 1 of 4096", 0.85, "bytes", H200.bytes_per_s),
    Roofline("prefill", "1 x 8192 of 8192", 0.9, "flops", H200.flops_per_s, FLASH_ATTENTION_FLOPS_PER_S),
    Roofline("rms_norm", "8192 x 4096", 0.85, "bytes", COPY_BYTES_PER_S),
    Roofline("add_rms_norm", "8192 x 4096", 0.85, "bytes", COPY_BYTES_PER_S),
    Roofline("gated_activation", "8192 x 14336", 0.85, "bytes", COPY_BYTES_PER_S),
    Roofline("rotate_and_store", "8192 x 6144", 0.85, "bytes", COPY_BYTES_PER_S),
)


def all_figures() -> list[Figure]:
    """Every figure there is, in the order of the table."""
    prompts = [figure for prompt in PROMPTS for figure in (prompt.first, prompt.again)]
    servings = [figure for serving in SERVINGS for figure in serving.figures.values()]
    return [
        *(decode.figure for decode in (*DECODES, FP8_DECODE)),
        IDLE,
        *prompts,
        *(run.figure for run in RUNS),
        INVARIANT_COST,
        *servings,
        START_FIRST,
        START_AGAIN,
    ]


def goals_of(model: str, gpu: str | None) -> dict[str, Goal]:
    """What is measured of a model: what its table names, or everything. Only on the table's GPU can it be compared."""
    goals = GOALS.get(model) or {figure.name: Goal() for figure in all_figures()}
    return goals if find_ceilings(gpu) is H200 else dict.fromkeys(goals, Goal())


def _lengths(requests: list[BenchRequest]) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.output_len) for request in requests]
