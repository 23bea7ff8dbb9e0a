"""Has this code become slower than it may? Paired trials of two engines, until a sequential test decides.

Both engines are up at the same time and get the same requests, one after the other, in an order drawn by a coin: so the
noise of the machine falls on both alike (bench/sequential.py). Invariant: a regression is told only if it shows twice,
the second time with both engines started anew, because a process keeps what luck its start had (addresses, placement).
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.config import BenchConfig, GateConfig
from bench.engines import (
    Engine,
    RecordingEndedError,
    at_url,
    other_revision,
    recording,
    this_checkout,
    transformers_generate,
)
from bench.environment import environment
from bench.limits import Limit, Verdict, read_limits
from bench.load import Load
from bench.result import BenchResult
from bench.run import model_name, served_model, serving_requests, short_name, workload
from bench.server import OnProgress
from bench.workloads import BenchRequest
from engine.config import EngineConfig
from engine.errors import UserError

EXIT_CODES = {Verdict.FINE: 0, Verdict.REGRESSED: 3, Verdict.UNDECIDED: 4}
STARTS = 2
DEFAULT_CONCURRENCY, DEFAULT_INPUT_LEN, DEFAULT_OUTPUT_LEN = 16, 128, 64
PROMPTS_PER_CLIENT = 2
MACHINE = ("gpu", "num_gpus", "driver", "cpu", "cpu_count", "python", "torch")  # what a recording holds for
DEFINITIONS = {
    "measured": "median over the pairs of trials of how this code's figure differs from the other's",
    "95% interval": "holds the true change in at least 95 % of gates, whenever the trials were stopped",
    "regressed": "beyond the limit: two starts of both engines said so, each errs in at most 5 % of gates, so that "
    "unchanged code is called regressed in at most 0.25 %",
    "fine": "within the limit: a figure that is not is called so in at most 5 % of gates",
    "trial": "the same requests to both, one after the other, the order drawn by a coin; failures end the gate",
}


OnPair = Callable[["Gate", float], None]


@dataclass(frozen=True)
class Pair:
    """Two trials of the same requests."""

    start: int  # which start of the engines, 0 or 1
    is_after_first: bool
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass
class Gate:
    """What is held against what, and what was found so far."""

    before: Engine
    after: Engine
    limits: list[Limit]
    budget_s: float
    coin: random.Random = field(default_factory=random.Random)
    pairs: list[Pair] = field(default_factory=list)
    num_invalid: int = 0  # pairs in which the client was the bottleneck: they say nothing, and do not count
    verdict: Verdict = Verdict.UNDECIDED
    reason: str = ""  # of being undecided
    _log_ratios: dict[tuple[Limit, int], list[float]] = field(default_factory=dict)  # by the start of the pairs

    def run(
        self,
        requests_of: Callable[[int], list[BenchRequest]],
        load: Load,
        on_start: OnProgress = lambda stage, share: None,
        on_pair: OnPair = lambda gate, share: None,
    ) -> None:
        """Trials until there is a verdict. `requests_of` makes those of the n-th pair.

        `on_start` hears how the engines start, `on_pair` before each pair which share of the budget is spent.
        """
        begin = time.monotonic()

        def share_of_budget() -> float:
            return (time.monotonic() - begin) / self.budget_s

        for start in range(STARTS):
            with self.before.start(on_start) as run_before, self.after.start(on_start) as run_after:
                while (verdict := self.judge(start)) is Verdict.UNDECIDED and not self.reason:
                    on_pair(self, min(1.0, share_of_budget()))
                    requests, is_after_first = requests_of(len(self.pairs) + self.num_invalid), self.coin.random() < 0.5
                    trials = [("before", run_before), ("after", run_after)][:: -1 if is_after_first else 1]
                    try:
                        figures = {side: run_trial(requests, load).metrics for side, run_trial in trials}
                    except RecordingEndedError as error:
                        self.reason = str(error)
                        break
                    self._add(Pair(start, is_after_first, **figures))
                    if share_of_budget() >= 1:
                        self.reason = f"--budget {self.budget_s:g}s is spent"
            if verdict is not Verdict.REGRESSED:
                break
            if self.reason:  # an alarm, and no time to hear it again
                verdict = Verdict.UNDECIDED
                break
        self.verdict = verdict
        if verdict is not Verdict.UNDECIDED:
            self.reason = ""

    def _add(self, pair: Pair) -> None:
        for engine, figures in ((self.before, pair.before), (self.after, pair.after)):
            if figures.get("failed"):
                errors = ", ".join(figures.get("errors", {}))
                raise UserError(f"{figures['failed']} requests to {engine.name} failed: {errors}")
        if pair.before.get("valid", True) and pair.after.get("valid", True):
            self.pairs.append(pair)
            for limit in self.limits:
                log_ratio = limit.log_ratio(pair.before, pair.after)
                self._log_ratios.setdefault((limit, pair.start), []).append(log_ratio)
        else:
            self.num_invalid += 1

    def judge(self, start: int) -> Verdict:
        """What the trials since one start of the engines say: regressed if any figure is, fine if all are."""
        verdicts = {limit.judge(self.log_ratios(limit, start), len(self.limits)) for limit in self.limits}
        if Verdict.REGRESSED in verdicts:
            return Verdict.REGRESSED
        return Verdict.FINE if verdicts == {Verdict.FINE} else Verdict.UNDECIDED

    def log_ratios(self, limit: Limit, start: int | None = None) -> list[float]:
        """One for each pair, since one start or of all."""
        starts = range(STARTS) if start is None else [start]
        return [ratio for each in starts for ratio in self._log_ratios.get((limit, each), [])]

    def describe(self) -> str:
        """What was measured so far, in a few words."""
        changes = (f"{limit.text} is at {limit.median_change(self.log_ratios(limit)):+.1%}" for limit in self.limits)
        return f"{len(self.pairs)} pairs: {', '.join(changes)}" if self.pairs else ""

    def findings(self) -> list[dict[str, Any]]:
        """One for each limit: what was measured, and the verdict on it."""
        last = max((pair.start for pair in self.pairs), default=0)

        def verdict(limit: Limit) -> Verdict:
            verdict = limit.judge(self.log_ratios(limit, last), len(self.limits))
            is_alarm = verdict is Verdict.REGRESSED and self.verdict is not verdict  # it was not heard again
            return Verdict.UNDECIDED if is_alarm else verdict

        return [
            {
                "figure": limit.key,
                "limit": limit.text,
                **limit.estimate(self.log_ratios(limit)),
                "verdict": verdict(limit).value,
            }
            for limit in self.limits
        ]


def run_gate(
    engine: EngineConfig,
    options: GateConfig,
    serve_arguments: Callable[[EngineConfig], list[str]],
    on_start: OnProgress = lambda stage, share: None,
    on_pair: OnPair = lambda gate, share: None,
) -> BenchResult:
    """The whole gate. `serve_arguments` says a config on the command line of `vcli serve`. Raises UserError."""
    limits, baseline = read_limits(options.metric), _read_baseline(options, engine)
    options_of_trial = _trial(options, baseline)
    load = Load(options_of_trial.batch_size, seed=engine.seed)

    def requests_of(index: int) -> list[BenchRequest]:
        return serving_requests(replace(engine, seed=engine.seed + index), options_of_trial)

    first = requests_of(0)  # what is wrong with them is said now
    model = _model(engine, options, baseline)
    gate = Gate(*_engines(engine, options, baseline, serve_arguments), limits, options.budget_s)
    gate.run(requests_of, load, on_start, on_pair)
    return BenchResult(
        kind="gate",
        model=model,
        workload=workload(engine, options_of_trial, first, load),
        metrics={
            "verdict": gate.verdict.value,
            "reason": gate.reason,
            "before": gate.before.title,
            "after": gate.after.title,
            "num_pairs": len(gate.pairs),
            "num_starts": 1 + max((pair.start for pair in gate.pairs), default=0),
            "num_invalid": gate.num_invalid,
            "limits": gate.findings(),
        },
        environment=environment(),
        definitions=dict(DEFINITIONS),
        trials=[asdict(pair) for pair in gate.pairs],
    )


def _read_baseline(options: GateConfig, engine: EngineConfig) -> BenchResult:
    """The result in --baseline; an empty one where there is none."""
    if options.baseline is None:
        if not options.against:
            raise UserError("a gate needs something to hold this code against: --baseline FILE or --against REV")
        return BenchResult()
    result = BenchResult.read(options.baseline)
    if result.kind not in ("serving", "gate"):
        raise UserError(
            f"--baseline {options.baseline}: is of kind {result.kind!r}; a gate repeats a run against a server"
        )
    if (rate := result.workload.get("request_rate")) is not None:
        raise UserError(f"--baseline {options.baseline}: was sent at {rate} req/s; a gate needs one of --concurrency")
    return result


def _model(engine: EngineConfig, options: GateConfig, baseline: BenchResult) -> str:
    """What is measured. Raises UserError where --baseline was of another model and nobody says that this is meant."""
    model = short_name(str(served_model(options.url, options.api_key)["id"])) if options.url else model_name(engine)
    is_meant = (engine.model or options.url) and options.against != "recorded"
    if baseline.model not in ("", model) and not is_meant:
        raise UserError(f"--baseline {options.baseline}: was of {baseline.model}, and this is {model}: give that MODEL")
    return model


def _trial(options: GateConfig, baseline: BenchResult) -> BenchConfig:
    """What is sent in each trial: as the flags say, then as the baseline was, then by default."""
    recorded = baseline.workload
    concurrency = options.concurrency or recorded.get("concurrency") or DEFAULT_CONCURRENCY
    if recorded.get("dataset", "random") not in ("random", Path(options.dataset).name):
        raise UserError(f"--baseline {options.baseline}: was of {recorded['dataset']}: give that file with --dataset")
    return BenchConfig(
        concurrency=(concurrency,),
        num_prompts=options.num_prompts or PROMPTS_PER_CLIENT * concurrency,
        dataset=options.dataset,
        input_len=options.input_len or recorded.get("input_len") or DEFAULT_INPUT_LEN,
        output_len=options.output_len or recorded.get("output_len") or DEFAULT_OUTPUT_LEN,
        range_ratio=recorded.get("range_ratio", 0.0),
        prefix_len=recorded.get("prefix_len", 0),
        num_prefixes=recorded.get("num_prefixes", 1),
        turns=recorded.get("turns", 1),
        url=options.url,
        api_key=options.api_key,
    )


def _engines(
    engine: EngineConfig,
    options: GateConfig,
    baseline: BenchResult,
    serve_arguments: Callable[[EngineConfig], list[str]],
) -> tuple[Engine, Engine]:
    """What this code is held against, and this code. On one GPU each takes half of the share that they may have."""
    after = at_url(options.url, options.api_key) if options.url else this_checkout(serve_arguments(engine))
    if options.against == "recorded":
        return recording(f"{options.baseline}", _recorded_trials(options, baseline)), after
    if options.against == "transformers":
        if baseline.workload.get("turns", 1) > 1:
            raise UserError(f"--baseline {options.baseline}: has turns, and a batch of transformers' has no next turn")
        return transformers_generate(engine), after
    if "://" in options.against:
        return at_url(options.against, options.api_key), after
    revision = options.against or baseline.environment.get("git_revision")
    if not revision:
        raise UserError(f"--baseline {options.baseline}: does not say of which revision it is: give --against REV")
    half = replace(engine, gpu_memory_utilization=engine.gpu_memory_utilization / 2)  # of the whole GPU, from the first
    return other_revision(revision, serve_arguments(half)), after


def _recorded_trials(options: GateConfig, baseline: BenchResult) -> list[dict[str, Any]]:
    """The trials of the code that a gate passed or failed. Raises UserError where they cannot be compared with ours."""
    if not baseline.trials:
        raise UserError("--against recorded needs the trials of a gate: --baseline FILE.json, written by its --output")
    here = environment()
    for name in MACHINE:
        if (recorded := baseline.environment.get(name)) != here[name]:
            raise UserError(
                f"--baseline {options.baseline}: was measured with {name} {recorded}, here it is {here[name]}: figures "
                "of another machine say nothing of this code. Leave out --against: the revision is measured anew"
            )
    return [trial["after"] for trial in baseline.trials]
