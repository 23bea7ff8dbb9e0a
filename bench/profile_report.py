"""A profile as tables, as sentences and as JSON."""

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.advice import Advice, Check, advise, in_words
from bench.profile import GLUE, IDLE, Part, Profile
from bench.report import Table
from bench.result import BenchResult
from bench.run import model_name
from engine.step_clock import STAGES

BUSY_LOAD = 1.5  # load average for each core, of which the engine's own threads are 1
DEFINITIONS = {
    "us": "of a mean step that was looked into, by the wall clock; all rows add up to it",
    "of ceiling": "the time that the step's own bytes and FLOPs need at the rates measured on this device just before, "
    "as a share of the time they took; above 100%: data came out of a cache",
    GLUE: "the embedding, tables of blocks, and Python, between two ops",
    IDLE: "no kernel and no copy runs on the GPU",
    "stages": "the engine's thread, left alone, by its own clock; detokenize: a server does it in another process",
    "tok/s": "tokens of prompts that got their first token, and all tokens drawn",
}


@dataclass(frozen=True)
class Report:
    """A profile, what it says, and what came of the first advice that a flag can follow."""

    profile: Profile
    advice: list[Advice] = field(default_factory=list)
    checked: Advice | None = None
    check: Check | None = None

    @classmethod
    def of(cls, profile: Profile) -> "Report":
        return cls(profile, advise(profile))

    @property
    def first_to_try(self) -> Advice | None:
        return next((advice for advice in self.advice if advice.changes or advice.load), None)


def describe(profile: Profile) -> str:
    options, env = profile.options, profile.environment
    is_random = options.dataset == "random"
    shape = f"{options.input_len}/{options.output_len}" if is_random else Path(options.dataset).name
    machine = env["gpu"] if profile.is_gpu else f"{env['cpu']} ({env['cpu_count']} cores)"
    rate = f"{profile.run.num_tokens / profile.run.seconds:,.0f} tok/s"
    drawn = f"{profile.run.output_tokens_per_s:,.0f} of them drawn"
    load = f"{shape}, {options.concurrency} at a time"
    return f"{model_name(profile.engine)} · {load} · {profile.dtype} · {machine} · {rate}, {drawn}"


def part_table(profile: Profile) -> Table:
    """Where a step's time goes, and how far each part is from what the device does at best."""
    rows = [_part_row(part) for part in profile.parts]
    total = sum(part.share for part in profile.parts)
    step = ["all", profile.step_us, f"{total:.1%}", *[None] * 5]
    return ["part", "us a step", "share", "calls", "MB", "GFLOP", "bound by", "of ceiling"], [*rows, step]


def stage_table(profile: Profile) -> Table:
    """What the engine's thread does."""
    seconds, num_steps = profile.run.stage_seconds, len(profile.run.steps)
    rows: list[list[Any]] = [
        [
            stage,
            seconds[stage] / num_steps * 1e6,
            f"{seconds[stage] / profile.run.seconds:.1%}",
            STAGES.get(stage, "text"),
        ]
        for stage in seconds
        if seconds[stage]
    ]
    rows.append(["all", sum(seconds.values()) / num_steps * 1e6, f"{profile.coverage:.1%}", "of the wall clock"])
    return ["stage", "us a step", "share", "what it is"], rows


def memory_table(profile: Profile) -> Table:
    return ["memory", "MB"], [[name, num_bytes / 1e6] for name, num_bytes in profile.memory.items()]


def batch_table(profile: Profile) -> Table:
    """What the steps were made of."""
    steps = profile.run.steps
    columns: dict[str, list[float]] = {
        "decodes in a step": [step.num_decodes for step in steps],
        "prompt tokens in a step": [step.num_prompt_tokens for step in steps],
        "requests running": [step.num_running for step in steps],
        "requests waiting": [step.num_waiting for step in steps],
        "KV blocks owned, %": [100 * step.kv_usage for step in steps],
        "KV slots empty, %": [100 * step.kv_waste for step in steps],
    }
    rows = [[name, statistics.mean(values), statistics.median(values), max(values)] for name, values in columns.items()]
    rows.append(["preemptions", steps[-1].num_preemptions - steps[0].num_preemptions, None, None])
    return ["batch", "mean", "p50", "max"], rows


def sentences(report: Report) -> list[str]:
    """What it all comes to."""
    said, env = in_words(report.advice, report.checked, report.check), report.profile.environment
    if not report.profile.is_gpu and env["load_average"] > BUSY_LOAD * env["cpu_count"]:
        load = f"load average {env['load_average']:g} on {env['cpu_count']} cores"
        said.append(f"This machine has other things to do ({load}): its rates vary while they are measured.")
    return said


def ceilings_note(profile: Profile) -> str:
    c = profile.ceilings
    unit, scale = ("TB/s", 1e12) if profile.is_gpu else ("GB/s", 1e9)
    flops = f"{c.flops_per_s / 1e12:.0f} TFLOP/s" if profile.is_gpu else f"{c.flops_per_s / 1e9:.0f} GFLOP/s"
    read, copied = c.read_bytes_per_s / scale, c.copied_bytes_per_s / scale
    return f"measured on this device: read {read:.2f} {unit}, copy {copied:.2f} {unit}, {profile.dtype} product {flops}"


def to_result(report: Report) -> BenchResult:
    """Everything, with the steps one by one, for a page or for another tool."""
    profile, steps = report.profile, report.profile.run.steps
    start = steps[0].end
    options = profile.options
    return BenchResult(
        kind="profile",
        model=model_name(profile.engine),
        workload={
            "dataset": options.dataset if options.dataset == "random" else Path(options.dataset).name,
            "concurrency": options.concurrency,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "seed": profile.engine.seed,
            "device": profile.device,
            "dtype": profile.dtype,
            "load_format": profile.engine.load_format,
            "quantization": profile.engine.quantization,
        },
        metrics={
            "duration": profile.run.seconds,
            "num_steps": len(steps),
            "total_token_throughput": profile.run.num_tokens / profile.run.seconds,
            "output_throughput": profile.run.output_tokens_per_s,
            "step_us": profile.step_us,
            "parts": [_part_values(part) for part in profile.parts],
            "stages": profile.run.stage_seconds,
            "coverage": profile.coverage,
            "ceilings": asdict(profile.ceilings),
            "memory_bytes": profile.memory,
            "steps": {
                "time": [step.end - start for step in steps],
                **{name: [getattr(step, name) for step in steps] for name in STEP_FIELDS},
            },
            "advice": [asdict(advice) for advice in report.advice],
            "check": _check_values(report),
        },
        environment=profile.environment,
        definitions=dict(DEFINITIONS),
    )


STEP_FIELDS = (
    "num_decodes", "num_prompt_tokens", "num_output_tokens", "num_running", "num_waiting", "num_preemptions",
    "kv_usage", "kv_waste",
)  # fmt: skip


def _part_row(part: Part) -> list[Any]:
    work = part.work
    return [
        part.part,
        part.us,
        f"{part.share:.1%}",
        part.calls or None,
        (work.read + work.written) / 1e6 if work else None,
        work.flops / 1e9 if work and work.flops else None,
        part.bound if work else None,
        f"{part.ceiling_share:.0%}" if part.ceiling_share else None,
    ]


def _check_values(report: Report) -> dict[str, Any] | None:
    if report.check is None or report.checked is None:
        return None
    changes = {**report.checked.changes, **report.checked.load}
    return {"changes": changes, **asdict(report.check), "verdict": report.check.verdict}


def _part_values(part: Part) -> dict[str, Any]:
    return {**asdict(part), "ceiling_share": part.ceiling_share}
