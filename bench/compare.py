"""Engines side by side: the same model and settings, the same requests from the same client, and nobody else at work.

They are started in turn, and in the opposite order the next time, so that a machine that warms up or slows down is not
held against the one that comes last. Ratios are taken between trials of the same requests.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import psutil

from bench import engines
from bench.adapters import ADAPTERS
from bench.config import BenchConfig, CompareConfig
from bench.engines import Engine, NotInstalledError, Trial
from bench.environment import environment, gpu_memory_used
from bench.load import Load
from bench.metrics import DEFINITIONS as METRIC_DEFINITIONS
from bench.result import BenchResult
from bench.run import model_name, serving_requests, token_requests, workload
from bench.server import OnProgress
from bench.workloads import BenchRequest, as_text
from engine.config import EngineConfig
from engine.errors import UserError
from engine.hub import resolve_model
from engine.tokenizer import Tokenizer

GENERATE = "transformers-generate"
NAMES = ("vcli", *ADAPTERS, GENERATE)
CONFIDENCE = 0.95  # of an interval, where there are enough trials for it: six
FIGURES = [f"{rate}_throughput" for rate in ("output", "total_token", "request")]
FIGURES += [f"{statistic}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for statistic in ("p50", "p99")]
DEFINITIONS = METRIC_DEFINITIONS | {
    "median": "over all trials of an engine",
    "interval": "from the smallest to the largest trial; of nine or more, between those that hold the median with 95 %",
    "ratio": "of an engine's figure to the first engine's on the same requests, median over the trials",
    "start": "from starting the process to its first success on the path that says it is ready, median; not of a URL",
    "memory": "after the trials: of all processes of the server or, with a GPU, what is used of it; not of a URL",
}


@dataclass
class Measured:
    """One engine's row."""

    engine: Engine
    trials: list[Trial] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    memory_bytes: int | None = None
    status: str = "measured"  # or "missing" or "failed"
    reason: str = ""

    def figures(self, first: "Measured") -> dict[str, dict[str, Any]]:
        """Median, interval and ratio of each figure that all trials have."""
        found = {}
        for name in FIGURES:
            values = [trial.metrics[name] for trial in self.trials if trial.metrics.get(name) is not None]
            if not values or len(values) < len(self.trials):
                continue
            found[name] = {"median": median(values), "interval": interval_of_median(values)}
            pairs = zip(values, first.trials, strict=False)
            if ratios := [value / other.metrics[name] for value, other in pairs if other.metrics.get(name)]:
                found[name] |= {"ratio": median(ratios), "ratio_interval": interval_of_median(ratios)}
        return found

    def to_dict(self, first: "Measured") -> dict[str, Any]:
        by_speed = sorted(self.trials, key=lambda trial: trial.metrics["output_throughput"])
        return {
            "name": self.engine.name,
            "version": self.engine.version,
            "command": self.engine.command,
            "status": self.status,
            "reason": self.reason,
            "note": self.engine.note,
            "start_s": self.start_s,
            "memory_bytes": self.memory_bytes,
            "figures": self.figures(first),
            "rounds": [trial.metrics for trial in self.trials],
            "samples": by_speed[len(by_speed) // 2].samples if by_speed else None,
        }


def run_compare(
    engine: EngineConfig,
    options: CompareConfig,
    serve_arguments: Callable[[EngineConfig], list[str]],
    on_progress: OnProgress = lambda stage, share: None,
) -> BenchResult:
    """Measure every engine that is there. Raises UserError for what none of them could be asked."""
    trial = _trial(options)
    load = Load(trial.batch_size, seed=engine.seed)
    path = resolve_model(engine.model, engine.revision)
    rows = [Measured(each) for each in find_engines(engine, options, serve_arguments)]
    rounds = [
        _both_forms(serving_requests(replace(engine, seed=engine.seed + index), trial), engine, str(path), rows)
        for index in range(options.starts * options.trials)
    ]
    for start in range(options.starts):
        own_rounds = rounds[start * options.trials : (start + 1) * options.trials]
        for row in rows if start % 2 == 0 else rows[::-1]:
            if row.status == "measured":
                _measure(row, own_rounds, load, engine.device, on_progress)
    first = rows[0]
    return BenchResult(
        kind="compare",
        model=model_name(engine),
        workload=workload(engine, trial, rounds[0][0], load),
        metrics={
            "reference": first.engine.name,
            "num_rounds": len(rounds),
            "confidence": confidence(len(rounds)),
            "valid": not _invalid_reasons(rows),
            "invalid_reasons": _invalid_reasons(rows),
        },
        environment=environment(),
        definitions=DEFINITIONS,
        engines=[row.to_dict(first) for row in rows],
    )


def _invalid_reasons(rows: list[Measured]) -> list[str]:
    """What makes the comparison worthless: nobody answered, or the client was the bottleneck of somebody's trial."""
    if not any(row.trials for row in rows):
        return ["no engine could be measured"]
    return [
        f"{row.engine.name}, trial {index + 1}: {reason}"
        for row in rows
        for index, trial in enumerate(row.trials)
        for reason in trial.metrics.get("invalid_reasons", [])
    ]


def find_engines(
    engine: EngineConfig, options: CompareConfig, serve_arguments: Callable[[EngineConfig], list[str]]
) -> list[Engine]:
    """What --engines names, in its order. Raises UserError for a name that nobody has."""
    environments = options.environments()
    found = []
    for name in options.engines:
        if name == "vcli":
            found.append(engines.this_checkout(serve_arguments(engine), name="vcli"))
        elif name == GENERATE:
            found.append(replace(engines.transformers_generate(engine), name=GENERATE))
        elif name in ADAPTERS:
            found.append(engines.peer(name, engine, environments.get(name)))
        elif "://" in name:
            found.append(engines.at_url(name, options.api_key))
        else:
            raise UserError(f"--engines {name}: no such engine; there are {', '.join(NAMES)}, and URLs of servers")
    return found


def interval_of_median(values: Sequence[float]) -> list[float]:
    """The order statistics between which the median lies with CONFIDENCE, or the extremes where there are too few."""
    ordered = sorted(values)
    cut = _num_cut(len(ordered))
    return [ordered[cut], ordered[-1 - cut]]


def confidence(num_values: int) -> float:
    """With which probability `interval_of_median` of so many values holds the median, whatever they are drawn from."""
    cut = _num_cut(num_values)
    return 1 - 2 * sum(math.comb(num_values, k) for k in range(cut + 1)) / 2**num_values


def _num_cut(num_values: int) -> int:
    """How many values may be cut off at either end: the median is beyond with a probability of a binomial's tail."""
    cut, tail = 0, 2 * (1 + num_values) / 2**num_values
    while tail <= 1 - CONFIDENCE:
        cut += 1
        tail += 2 * math.comb(num_values, cut + 1) / 2**num_values
    return cut


def _trial(options: CompareConfig) -> BenchConfig:
    return BenchConfig(
        concurrency=(options.concurrency,),
        num_prompts=options.num_prompts,
        dataset=options.dataset,
        input_len=options.input_len,
        output_len=options.output_len,
    )


def _both_forms(
    requests: list[BenchRequest], engine: EngineConfig, path: str, rows: list[Measured]
) -> tuple[list[BenchRequest], list[BenchRequest]]:
    """The requests as token ids and as text: the same tokens, where one of the engines takes nothing but text."""
    if all(row.engine.takes_token_ids for row in rows):
        return requests, requests
    texts = as_text(requests, Tokenizer.load(engine.tokenizer or path, engine.revision))
    return token_requests(texts, resolve_model(engine.model, engine.revision), engine), texts


def _measure(
    row: Measured,
    rounds: list[tuple[list[BenchRequest], list[BenchRequest]]],
    load: Load,
    device: str,
    on_progress: OnProgress,
) -> None:
    """One start of one engine. What goes wrong is its row's to say."""
    begin, name = time.monotonic(), row.engine.name
    try:
        with row.engine.start(lambda stage, share: on_progress(f"{name} starts: {stage}", share)) as run_trial:
            if not row.engine.is_running:
                row.start_s.append(time.monotonic() - begin)
            for index, (ids, texts) in enumerate(rounds):
                on_progress(f"{name}: trial {index + 1} of {len(rounds)}", index / len(rounds))
                trial = run_trial(ids if row.engine.takes_token_ids else texts, load)
                if not trial.metrics["completed"]:
                    raise UserError(", ".join(trial.metrics["errors"]))
                row.trials.append(trial)
            if not row.engine.is_running:
                row.memory_bytes = max(row.memory_bytes or 0, _memory_used(device)) or None
    except NotInstalledError as error:
        row.status, row.reason = "missing", str(error)
    except UserError as error:
        row.status, row.reason, row.trials = "failed", " ".join(str(error).split()), []


def _memory_used(device: str) -> int:
    """Bytes: of the GPU, or of the processes that this one has started, pages they share counted once."""
    if device != "cpu" and (used := gpu_memory_used()) is not None:
        return used
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total
