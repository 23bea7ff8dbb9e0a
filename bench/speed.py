"""Every figure that speed is judged by, in one go: are the tokens right, and then how fast do they come?

    python -m bench.speed MODEL... --trace trace.json.gz

MODEL is a folder with a config.json and a tokenizer; its weights are random ones. For each model the figures of
bench/figures.py are measured on an engine in this process and then on a server, and every one is written as soon as it
is there, beside its floor, the peer's and the target. A second run with another --only adds its rows to the same file.
Exit codes: 0 measured, 3 a token was wrong (nothing is measured then), 1 something could not be measured.
"""

import argparse
import importlib.util
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import figures, serving, throughput, trace
from bench.client import LoadClient
from bench.environment import environment
from bench.figures import Decode, Figure, Goal, Prompt, Run, Serving
from bench.floor import H200, Floor, find_ceilings
from bench.free_memory import free_memory
from bench.load import Load
from bench.readme_tables import speed_table, time_table
from bench.report import format_figure
from bench.run_async import run_async
from bench.server import running_server
from bench.workloads import BenchRequest, random_requests
from engine.config import EngineConfig
from engine.errors import UserError
from engine.messages import AddRequest
from engine.model_config import ModelConfig
from engine.quantization.at_load import scheme_of_layers
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore

PROMPT_REPEATS = 5
TRACED = Decode(64)  # for the idle share
ALSO_TRACED = (Decode(1, 128, 256), Decode(256))
TRACED_STEPS = 20
TRACED_PROMPT = Prompt(8192)  # fills a step
TRACED_PROMPTS = 3
WARM_UP_TOKENS = 8
FIRST_REQUEST = (64, 8)  # tokens in and out of the request whose answer ends a start
EXIT_WRONG = 3
RESULTS = Path(__file__).resolve().parent / "results"
# What is measured in one engine: the figures that it is for, and their values in the figures' units. Of a trace there
# are none: it shows where the time of its figure goes.
Measurement = tuple[tuple[Figure, ...], Callable[["EngineCore"], list[float]]]


@dataclass(frozen=True)
class Row:
    """One line of the table. Values are in `unit`, and less is better."""

    figure: str
    model: str
    dtype: str
    value: float
    unit: str
    floor: float | None = None
    peer: float | None = None
    target: float | None = None
    met: bool | None = None  # None: there is no target
    note: str = ""
    git_revision: str | None = None
    date: str | None = None


class Results:
    """The file of the rows, written after each of them, so that a run that is cut off keeps what it has."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        """Rows that the file has already stay, until they are measured again."""
        self.path = path
        self.values: dict[str, Any] = {"kind": "speed", "environment": environment, "rows": [], "time": {}, "start": {}}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            self.values |= {name: before[name] for name in ("rows", "time", "start")}

    def add(self, row: Row) -> None:
        """Put a row into the place of the one that was there for the same figure and model, or at the end."""
        env, rows = self.values["environment"], self.values["rows"]
        row = replace(row, git_revision=env["git_revision"], date=env["date"])
        place = next((i for i, r in enumerate(rows) if (r["figure"], r["model"]) == (row.figure, row.model)), len(rows))
        rows[place : place + 1] = [asdict(row)]
        note = f" ({row.note})" if row.note else ""
        print(f"{row.model}: {row.figure}: {format_figure(row.value)} {row.unit}{note}", flush=True)
        self._write()

    def add_time(self, model: str, step: str, shares: list[trace.Share]) -> None:
        """Where the time of a model's traced steps goes. step: the figure that times such steps."""
        own = {step: [asdict(share) for share in shares]}
        self.values["time"].setdefault(model, {}).update(own)
        print(f"{model}:\n{time_table(own)}", flush=True)
        self._write()

    def add_start(self, model: str, timeline: list[str]) -> None:
        """What each process of a model's server did until it was ready, the second time."""
        self.values["start"][model] = timeline
        print("\n".join(timeline), flush=True)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ModelBench:
    """One model's figures: an engine in this process, then a server, then two variants of the engine."""

    engine: EngineConfig
    results: Results
    only: re.Pattern[str] = re.compile("")
    trace_path: Path | None = None
    server_arguments: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's, and how its weights are rounded when they load."""
        name, scheme = Path(self.engine.model).name, self.engine.quantization
        return name if scheme == "auto" else f"{name}-{scheme}"

    @property
    def goals(self) -> dict[str, Goal]:
        """What is measured: all of the model's figures that --only names, and what they are told by."""
        goals = figures.goals_of(self.name, self.results.values["environment"]["gpu"])
        names = {name for name in goals if self.only.search(name)}
        if figures.INVARIANT_COST.name in names:
            names.add(figures.MIXED.title)
        return {name: goal for name, goal in goals.items() if name in names}

    def measure_engine(self) -> None:
        """All figures of the plain engine."""
        measurements: list[Measurement] = [
            *(((decode.figure,), partial(self._decode, decode)) for decode in figures.DECODES),
            ((figures.IDLE,), self._idle),
            *(((decode.figure,), partial(self._where_decode_goes, decode)) for decode in ALSO_TRACED),
            *(((prompt.first, prompt.again), partial(_prompt, prompt)) for prompt in figures.PROMPTS),
            ((TRACED_PROMPT.first,), self._where_prompts_go),
            *(((run.figure,), partial(_run, run)) for run in figures.RUNS),
        ]
        self._measure(measurements)

    def measure_fp8(self) -> None:
        """An engine with an fp8 KV cache."""
        decode = figures.FP8_DECODE
        self._measure([((decode.figure,), partial(self._decode, decode))], kv_cache_dtype=decode.kv_cache_dtype)

    def measure_invariant(self) -> None:
        """What batch invariance costs, in an engine that has it."""
        self._measure([((figures.INVARIANT_COST,), self._invariant_cost)], batch_invariant=True)

    def _measure(self, measurements: list[Measurement], **flags: Any) -> None:
        """Start an engine with these flags, if any of the figures is asked for, and measure them."""
        wanted = [each for each in measurements if any(figure.name in self.goals for figure in each[0])]
        if not wanted:
            return
        from engine.core import EngineCore

        try:
            core = EngineCore(replace(self.engine, **flags))
        except UserError as error:
            if not flags:
                raise
            print(f"{self.name}: left out: {', '.join(figure.name for own, _ in wanted for figure in own)}: {error}")
            return
        floor = self._floor(core.ready.dtype, flags.get("kv_cache_dtype", "auto"))
        for own_figures, measure in wanted:
            values = measure(core)
            for figure, value in zip(own_figures, values, strict=bool(values)):
                self._add(figure, value, core.ready.dtype, floor)

    def _add(
        self, figure: Figure, value: float, dtype: str, floor: Floor | None, reasons: list[str] | None = None
    ) -> None:
        """Add a figure's row, if it was asked for. `reasons`: why it says nothing about the engine."""
        goal = self.goals.get(figure.name)
        if goal is None:
            return
        met = None if goal.target is None else value <= goal.target and not reasons
        note = "; ".join(reasons or [])
        row = Row(
            figure.name, self.name, dtype, value, figure.unit, figure.floor(floor), goal.peer, goal.target, met, note
        )
        self.results.add(row)

    def _floor(self, dtype: str, kv_dtype: str = "auto") -> Floor | None:
        ceilings = find_ceilings(self.results.values["environment"]["gpu"])
        path = Path(self.engine.model)
        model = ModelConfig.from_path(path)
        scheme = scheme_of_layers(model, self.engine.quantization, path)
        return Floor(model, dtype, ceilings, kv_dtype, scheme) if ceilings else None

    def _decode(self, decode: Decode, core: "EngineCore") -> list[float]:
        requests = _cached_requests(core, decode)
        steps = throughput.decode_steps(throughput.measure(core, requests), decode.batch)
        if len(steps) < decode.output_len:
            raise UserError(
                f"{decode.figure.name}: {len(steps)} of {decode.output_len} steps had a full batch: "
                f"the KV cache ({core.ready.num_blocks:,} blocks) or --max-num-seqs is too small for it"
            )
        return [statistics.mean(step.seconds for step in steps) * 1e3]

    def _idle(self, core: "EngineCore") -> list[float]:
        """How long the GPU has nothing to do in the middle of a decode, and where the time of its steps goes."""
        return [100 * trace.idle_share(self._trace_decode(TRACED, core, self.trace_path))]

    def _where_decode_goes(self, decode: Decode, core: "EngineCore") -> list[float]:
        """Of steps that decode, as the figure of the same name."""
        self._trace_decode(decode, core)
        return []

    def _where_prompts_go(self, core: "EngineCore") -> list[float]:
        """Of prompts, each of them a step, with two in flight."""
        prompt, num_steps = TRACED_PROMPT, TRACED_PROMPTS + 1
        requests = random_requests(
            trace.WARM_UP_STEPS + num_steps,
            input_len=prompt.length,
            output_len=1,
            vocab_size=core.ready.vocab_size,
            seed=prompt.length + PROMPT_REPEATS + 1,  # none that has been measured, and is in the prefix cache
        )
        self._trace(prompt.first, core, requests, num_steps, lambda floor: floor.prefill_parts_s(prompt.length))
        return []

    def _trace_decode(self, decode: Decode, core: "EngineCore", path: Path | None = None) -> list[trace.Kernel]:
        requests = _cached_requests(core, decode)
        context = decode.input_len + TRACED_STEPS  # the first steps are traced: little more than the prompts
        return self._trace(
            decode.figure,
            core,
            requests,
            TRACED_STEPS + 1,
            lambda floor: floor.decode_parts_s(decode.batch, context),
            path,
        )

    def _trace(
        self,
        figure: Figure,
        core: "EngineCore",
        requests: list[BenchRequest],
        num_steps: int,
        parts_s: Callable[[Floor], dict[str, float]],
        path: Path | None = None,
    ) -> list[trace.Kernel]:
        """Trace the first steps of these requests: they are such as the figure times."""
        for index, request in enumerate(requests):
            params = SamplingParams(temperature=0.0, max_tokens=request.output_len, ignore_eos=True, detokenize=False)
            assert isinstance(request.prompt, list)
            core.add(AddRequest(f"traced-{index}", request.prompt, params))
        kernels, num_whole = trace.whole_steps(trace.record(core, num_steps, path))
        core.abort(f"traced-{index}" for index in range(len(requests)))
        while core.has_work:
            core.step()
        floor = self._floor(core.ready.dtype)
        shares = trace.where_the_time_goes(kernels, num_whole, parts_s(floor) if floor else {})
        self.results.add_time(self.name, figure.name, shares)
        return kernels

    def _invariant_cost(self, core: "EngineCore") -> list[float]:
        """In percent of the throughput without it, which the plain engine has just measured."""
        (seconds,) = _run(figures.MIXED, core)
        rows = self.results.values["rows"]
        plain = next(r for r in rows if (r["figure"], r["model"]) == (figures.MIXED.title, self.name))
        return [100 * (1 - plain["value"] / seconds)]

    def measure_server(self) -> None:
        """Start a server where nothing is compiled, start it again, and load it."""
        starts = figures.START_FIRST, figures.START_AGAIN
        loads = [load for load in figures.SERVINGS if any(f.name in self.goals for f in load.figures.values())]
        if not loads and not any(figure.name in self.goals for figure in starts):
            return
        model = ModelConfig.from_path(Path(self.engine.model))
        floor = self._floor(model.dtype)
        arguments = [self.engine.model, "--load-format", "dummy", "--quantization", self.engine.quantization]
        arguments += ["--explain-startup", *self.server_arguments]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "server.log"
            for figure in starts:
                before = time.perf_counter()
                with running_server(arguments, environment={"XDG_CACHE_HOME": folder}, log_path=log) as url:
                    name = run_async(_first_answer(url))
                    self._add(figure, time.perf_counter() - before, model.dtype, floor)
                    if figure is figures.START_AGAIN:
                        for load in loads:
                            self._load(load, url, name, model, floor)
            self.results.add_start(self.name, start_timeline(log.read_text(errors="replace")))

    def _load(self, load: Serving, url: str, name: str, model: ModelConfig, floor: Floor | None) -> None:
        requests = load.make(model.vocab_size)
        metrics = run_async(serving.measure(url, name, requests, Load(load.concurrency))).metrics()
        if metrics["failed"]:
            raise UserError(f"{load.title}: {metrics['failed']} requests failed: {'; '.join(metrics['errors'])}")
        for key, figure in load.figures.items():
            self._add(figure, metrics[key], model.dtype, floor, metrics["invalid_reasons"])


def _cached_requests(core: "EngineCore", decode: Decode) -> list[BenchRequest]:
    """Requests whose prompts are in the prefix cache, so that all of them begin to decode in the same step."""
    largest = max(other.batch for other in (*figures.DECODES, decode))
    # The token that ends the prompt's step is not one of the decode steps.
    lengths = {"input_len": decode.input_len, "output_len": decode.output_len + 1}
    requests = random_requests(largest, **lengths, vocab_size=core.ready.vocab_size, seed=0)[: decode.batch]
    throughput.measure(core, [replace(request, output_len=WARM_UP_TOKENS) for request in requests])
    return requests


def _prompt(prompt: Prompt, core: "EngineCore") -> list[float]:
    first, again = [], []
    for repeat in range(PROMPT_REPEATS + 1):
        seed = prompt.length + repeat
        requests = random_requests(
            1, input_len=prompt.length, output_len=1, vocab_size=core.ready.vocab_size, seed=seed
        )
        first.append(_duration(throughput.measure(core, requests)))
        again.append(_duration(throughput.measure(core, requests)))
    return [statistics.median(seconds[1:]) * 1e3 for seconds in (first, again)]  # the first round warms up


def _run(run: Run, core: "EngineCore") -> list[float]:
    requests = run.make(core.ready.vocab_size)
    throughput.measure(core, throughput.warm_up(requests))
    return [_duration(throughput.measure(core, requests))]


def _duration(steps: list[throughput.Step]) -> float:
    return sum(step.seconds for step in steps)


async def _first_answer(url: str) -> str:
    """Wait for a first answer; the served model's name."""
    name = str((await serving.served_model(url))["id"])
    num_input, num_output = FIRST_REQUEST
    async with LoadClient(url, name) as client:
        record = await client.send(BenchRequest(num_output, list(range(1, num_input + 1))))
    if record.error:
        raise UserError(f"the server does not answer: {record.error}")
    return name


def start_timeline(log: str) -> list[str]:
    """The table that --explain-startup prints, line by line."""
    _, found, after = log.partition("\nstart-up\n")
    assert found, log
    return list(itertools.takewhile(lambda line: re.match(r"process|api|engine", line), after.splitlines()))


def check_tokens(engine: EngineConfig, results: Results) -> bool:
    """Add a row for every mode of the engine; are all tokens right? Raises UserError where that cannot be told."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("the tokens cannot be checked without transformers: install it, or use --no-parity")
    from bench.modes import check_modes
    from engine.hub import resolve_model

    path = resolve_model(engine.model)
    is_right = True
    for mode in check_modes(engine):
        is_right = is_right and mode.is_right
        met, note = mode.is_right, mode.note
        results.add(Row(mode.mode, path.stem, "bfloat16", mode.value, mode.unit, target=mode.limit, met=met, note=note))
    free_memory()
    return is_right


def measure_kernels(results: Results, only: re.Pattern[str]) -> None:
    """Add a row for each kernel that is to reach a share of what the GPU can do, and that --only names."""
    wanted = {(roofline.op, roofline.shape): roofline for roofline in figures.ROOFLINES if only.search(roofline.name)}
    if not wanted:
        return
    from bench import kernels
    from bench.ceilings import Ceilings

    is_known = find_ceilings(results.values["environment"]["gpu"]) is not None
    ceilings = Ceilings(H200.bytes_per_s, figures.COPY_BYTES_PER_S, H200.flops_per_s)
    for case in kernels.cases():
        if roofline := wanted.get((case.op, case.shape)):
            us = kernels.measure(case, ceilings).us
            work = getattr(case, roofline.counts)
            goal = roofline.goal(work) if is_known else Goal()
            met = us <= goal.target if goal.target else None
            floor = roofline.floor_us(work) if is_known else None
            results.add(Row(roofline.name, "kernels", "bfloat16", us, "us", floor, goal.peer, goal.target, met))


def default_output(gpu: str) -> Path:
    """h200-speed.json for an NVIDIA H200."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return RESULTS / f"{'-'.join(word for word in words if word != 'nvidia')}-speed.json"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="folder with config.json and tokenizer")
    schemes = ["auto", "fp8", "int8"]
    parser.add_argument("--quantization", choices=schemes, default="auto", help="round weights when they load")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only figures whose name holds this pattern")
    parser.add_argument("--no-parity", action="store_true", help="leave out the check of the tokens")
    parser.add_argument("--output", type=Path, help="default: bench/results/GPU-speed.json")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep the first model's of batch 64: .json[.gz]")
    options = parser.parse_args(arguments)
    started, env = time.perf_counter(), environment()
    try:
        if env["gpu"] is None:
            raise UserError("speed is measured on a GPU, and nvidia-smi sees none here")
        for path in options.models:
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is no model folder: it has no config.json")
        results = Results(options.output or default_output(env["gpu"]), env)
        if not options.no_parity and not check_tokens(EngineConfig(dtype="bfloat16"), results):
            print(f"bench.speed: tokens are wrong, nothing is measured: see {results.path}", file=sys.stderr)
            return EXIT_WRONG
    except UserError as error:
        print(f"bench.speed: {error}", file=sys.stderr)
        return 1
    only = re.compile(options.only)
    benches: list[ModelBench] = []
    for path in options.models:
        engine = EngineConfig(str(path.resolve()), load_format="dummy", skip_tokenizer_init=True)
        engine = replace(engine, quantization=options.quantization)
        benches.append(ModelBench(engine, results, only, None if benches else options.trace))
    # Kernels before long runs, which warm the GPU up until it slows down; then what most figures hang on, should the
    # run be cut off.
    parts: list[Callable[[], None]] = [partial(measure_kernels, results, only)]
    parts += [part for bench in benches for part in (bench.measure_engine, bench.measure_server)]
    parts += [part for bench in benches for part in (bench.measure_fp8, bench.measure_invariant)]
    num_failed = sum(not _succeeds(part) for part in parts)
    print(f"\n{speed_table(results.values['rows'])}\n\n{results.path}")
    print(f"took {time.perf_counter() - started:.0f} s, {num_failed} parts failed")
    return 1 if num_failed else 0


def _succeeds(part: Callable[[], None]) -> bool:
    """Run a part; its failure is told, and does not keep the others from being measured."""
    try:
        part()
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        print(f"bench.speed: {error}", file=sys.stderr)
        return False
    finally:
        free_memory()
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
