"""One benchmark from its options to its result: workload, measurement, baseline, floor, environment.

The same options give the same requests every time they are made, so the baseline asks for what was measured.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import floor, serving
from bench.baseline import DEFINITIONS as BASELINE_DEFINITIONS
from bench.baseline import BaselineModel, BaselineTask, running_baseline
from bench.config import BenchConfig
from bench.environment import environment
from bench.free_memory import free_memory
from bench.load import Load
from bench.metrics import DEFINITIONS, GOODPUT_DEFINITION, STEADY_DEFINITION, WINDOW_DEFINITIONS
from bench.result import BenchResult
from bench.run_async import run_async
from bench.workloads import BenchRequest, check_lengths, file_requests, random_requests
from engine.config import EngineConfig
from engine.errors import UserError
from engine.hub import resolve_model
from engine.model_config import ModelConfig
from engine.quantization.at_load import scheme_of_layers

# Token ids below this are in every vocabulary, for a server whose model is not on this machine.
SAFE_VOCAB_SIZE = 32_000
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def run_sweep(
    engine: EngineConfig,
    options: BenchConfig,
    url: str,
    workloads: list[list[BenchRequest]],
    on_progress: Callable[[serving.RunProgress], None],
) -> BenchResult:
    """Measure the server at `url` at each point of options.points(), one after the other."""
    points = _points(engine, options)
    if len(points) == 1:
        return run_serving(*points[0], url, workloads[0], on_progress)
    runs: list[BenchResult] = []
    for (own_engine, point), requests in zip(points, workloads, strict=True):

        def show(progress: serving.RunProgress, done: str = f"{len(runs) + 1} of {len(points)}") -> None:
            on_progress(replace(progress, stage=f"{done}: {progress.stage}"))

        runs.append(run_serving(own_engine, point, url, requests, show))
    first = runs[0]
    shared = {name: value for name, value in first.workload.items() if all(r.workload[name] == value for r in runs)}
    return replace(first, kind="sweep", workload=shared, metrics={}, floor=None, samples=None, runs=runs)


def run_serving(
    engine: EngineConfig,
    options: BenchConfig,
    url: str,
    requests: list[BenchRequest],
    on_progress: Callable[[serving.RunProgress], None],
) -> BenchResult:
    """Measure the server at `url`: the one at options.url, or one that runs `engine`."""
    served = served_model(url, options.api_key)
    name = engine.model if options.url and engine.model else str(served["id"])
    check_lengths(requests, served.get("max_model_len"))
    load = make_load(options, requests, engine.seed)
    count_tokens = _token_counter(engine) if options.url else None
    run = run_async(
        serving.measure(
            url, name, requests, load, api_key=options.api_key, count_tokens=count_tokens, on_progress=on_progress
        )
    )
    result = BenchResult(
        kind="serving",
        model=short_name(name),
        workload=workload(engine, options, requests, load),
        metrics=run.metrics(options.slo),
        environment=environment(),
        definitions=DEFINITIONS
        | (WINDOW_DEFINITIONS if load.duration_s is not None else STEADY_DEFINITION)
        | (GOODPUT_DEFINITION if options.slo else {}),
        samples=run.samples(),
    )
    if options.url:  # how that server runs its model, and where, is not ours to know
        return result
    lengths = [(r.num_prompt_tokens, r.num_output_tokens) for r in run.records if not r.error]
    return replace(result, floor=_floor(result, engine, lengths, load.concurrency or len(requests)))


def _token_counter(engine: EngineConfig) -> Callable[[str], int] | None:
    """Counts the tokens of a text, if --tokenizer says by what."""
    if not engine.tokenizer:
        return None

    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(engine.tokenizer, engine.revision)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def make_load(options: BenchConfig, requests: list[BenchRequest], seed: int) -> Load:
    """How the requests of a single point are sent: as the options say or, if they do not, as a trace does."""
    if options.concurrency is None and options.request_rate is None and requests[0].arrival is not None:
        if options.duration_s is not None:
            raise UserError("--duration does not go with a trace's own arrivals: cut it by --num-prompts")
        return Load(seed=seed)
    rate = options.request_rate[0] if options.request_rate else None
    return Load(options.batch_size if rate is None else None, rate, options.burstiness, options.duration_s, seed)


def served_model(url: str, api_key: str = "") -> dict[str, Any]:
    """What the server says of its model. Raises UserError when there is no server."""
    return dict(run_async(serving.served_model(url, api_key)))


def serving_workloads(engine: EngineConfig, options: BenchConfig) -> list[list[BenchRequest]]:
    """The requests of each point, made before a server is started, so that mistakes in them are told at once.

    Each point draws its own (seed, seed + 1, ...): no prompt is in a prefix cache because another point has sent it.
    """
    return [serving_requests(*point) for point in _points(engine, options)]


def _points(engine: EngineConfig, options: BenchConfig) -> list[tuple[EngineConfig, BenchConfig]]:
    return [(replace(engine, seed=engine.seed + i), point) for i, point in enumerate(options.points())]


def serving_requests(engine: EngineConfig, options: BenchConfig) -> list[BenchRequest]:
    if options.url:
        root = served_model(options.url, options.api_key).get("root")
        is_local = isinstance(root, str) and Path(root).exists()
        vocab_size = ModelConfig.from_path(Path(root)).vocab_size if root and is_local else SAFE_VOCAB_SIZE
        return make_requests(options, engine.seed, vocab_size)
    model = ModelConfig.from_path(resolve_model(engine.model, engine.revision))
    requests = make_requests(options, engine.seed, model.vocab_size)
    check_lengths(requests, engine.max_model_len or model.max_model_len)
    return requests


def run_offline(
    engine: EngineConfig,
    options: BenchConfig,
    on_start: Callable[[str, float], None],
    on_progress: Callable[[int, int], None],
) -> BenchResult:
    """Measure the engine in this process."""
    path = resolve_model(engine.model, engine.revision)
    requests = token_requests(make_requests(options, engine.seed, ModelConfig.from_path(path).vocab_size), path, engine)

    from bench import throughput
    from engine.core import EngineCore

    core = EngineCore(replace(engine, skip_tokenizer_init=True), on_start)
    check_lengths(requests, core.ready.max_model_len)
    throughput.measure(core, throughput.warm_up(requests))
    num_preemptions = core.stats.num_preemptions
    steps = throughput.measure(core, requests, on_progress)
    ready, num_preemptions = core.ready, core.stats.num_preemptions - num_preemptions
    del core
    free_memory()  # a baseline that follows in another process needs the room
    result = BenchResult(
        kind="throughput",
        model=model_name(engine),
        workload={
            **workload(engine, options, requests),
            "device": ready.device,
            "dtype": ready.dtype,
            "max_num_seqs": ready.max_num_seqs,
        },
        metrics=throughput.throughput_metrics(steps, requests, num_preemptions),
        environment=environment(),
        definitions=dict(throughput.DEFINITIONS),
    )
    lengths = [(len(request.prompt), request.output_len) for request in requests]
    return replace(result, floor=_floor(result, engine, lengths, ready.max_num_seqs))


def run_latency(
    engine: EngineConfig,
    options: BenchConfig,
    on_start: Callable[[str, float], None],
    on_progress: Callable[[str, int, int], None],
) -> BenchResult:
    """Measure prefill and decode of the engine in this process at each of options.batch_sizes."""
    from bench import latency
    from engine.core import EngineCore

    core = EngineCore(replace(engine, skip_tokenizer_init=True), on_start)
    if options.input_len + options.output_len + 1 > core.ready.max_model_len:
        raise UserError(
            f"--input-len {options.input_len:,} and --output-len {options.output_len:,} and one more are more than the "
            f"model's {core.ready.max_model_len:,} tokens"
        )
    env = environment()
    found = _find_floor(engine, env["gpu"] if core.ready.device.startswith("cuda") else None)
    rows = latency.measure(
        core,
        options.batch_sizes or (),
        input_len=options.input_len,
        output_len=options.output_len,
        seed=engine.seed,
        floor=found,
        on_progress=on_progress,
    )
    described = {"dataset": "random", "input_len": options.input_len, "output_len": options.output_len}
    described |= {"seed": engine.seed, "device": core.ready.device, "dtype": core.ready.dtype}
    described |= {"load_format": engine.load_format, "quantization": engine.quantization}
    return BenchResult(
        kind="latency",
        model=model_name(engine),
        workload=described,
        metrics={"rows": rows},
        environment=env,
        definitions=latency.DEFINITIONS | (latency.FLOOR_DEFINITION if found else {}),
    )


def with_baseline(result: BenchResult, engine: EngineConfig, options: BenchConfig) -> BenchResult:
    """The result with the same prompts run through transformers, batch by batch."""
    path = resolve_model(engine.model, engine.revision)
    requests = make_requests(options, engine.seed, ModelConfig.from_path(path).vocab_size)
    with running_baseline(baseline_model(engine)) as run:
        baseline = run(baseline_task(requests, engine, options.batch_size))
    baseline["ratio"] = result.metrics["output_throughput"] / baseline["output_throughput"]
    return replace(result, baseline=baseline, definitions=result.definitions | BASELINE_DEFINITIONS)


def baseline_model(engine: EngineConfig) -> BaselineModel:
    """The same weights, device and number type for transformers."""
    path = resolve_model(engine.model, engine.revision)
    return BaselineModel(str(path), engine.load_format, engine.device, engine.dtype)


def baseline_task(requests: list[BenchRequest], engine: EngineConfig, batch_size: int) -> BaselineTask:
    """The same requests for transformers."""
    requests = token_requests(requests, resolve_model(engine.model, engine.revision), engine)
    return BaselineTask(
        prompts=[request.prompt for request in requests if isinstance(request.prompt, list)],
        output_lens=[request.output_len for request in requests],
        batch_size=min(batch_size, len(requests)),
    )


def make_requests(options: BenchConfig, seed: int, vocab_size: int) -> list[BenchRequest]:
    """The workload. Raises UserError for a dataset file that cannot be read.

    A file with fewer prompts than are wanted is gone through again; of a trace all are wanted unless told otherwise.
    """
    if options.dataset == "random":
        return random_requests(
            options.num_requests,
            input_len=options.input_len,
            output_len=options.output_len,
            vocab_size=vocab_size,
            seed=seed,
            range_ratio=options.range_ratio,
            prefix_len=options.prefix_len,
            num_prefixes=options.num_prefixes,
            turns=options.turns,
        )
    requests = file_requests(
        Path(options.dataset), output_len=options.output_len, seed=seed, vocab_size=vocab_size, turns=options.turns
    )
    if requests[0].arrival is not None:
        return requests[: options.num_prompts]
    return [requests[i % len(requests)] for i in range(options.num_requests)]


def token_requests(requests: list[BenchRequest], path: Path, engine: EngineConfig) -> list[BenchRequest]:
    """The same requests with token ids for prompts, as the server would make them."""
    if all(isinstance(request.prompt, list) for request in requests):
        return requests

    from engine.chat_template import render_chat
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(engine.tokenizer or str(path), engine.revision)

    def token_ids(request: BenchRequest) -> list[int]:
        if request.messages is not None:
            if tokenizer.chat_template is None:
                raise UserError("the dataset holds messages, and the model has no chat template: use prompts")
            bos, eos = tokenizer.bos_token, tokenizer.eos_token
            text = render_chat(tokenizer.chat_template, request.messages, bos_token=bos, eos_token=eos)
            return tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt

    return [replace(request, prompt=token_ids(request), messages=None) for request in requests]


def model_name(engine: EngineConfig) -> str:
    """What a result calls the engine's model."""
    return short_name(engine.model or resolve_model("").stem)


def short_name(model: str) -> str:
    """A model's name for a table: the last part of a path, the whole of a name on the hub."""
    return Path(model).name if Path(model).exists() else model


def workload(
    engine: EngineConfig, options: BenchConfig, requests: list[BenchRequest], load: Load | None = None
) -> dict[str, Any]:
    """What was sent and how, for whoever reads the result; without a load: to the engine, all at once."""
    is_random = options.dataset == "random"
    host = urlsplit(options.url).hostname if options.url else None
    return {
        "dataset": options.dataset if is_random else Path(options.dataset).name,
        "num_prompts": len(requests),
        **({"input_len": options.input_len, "range_ratio": options.range_ratio} if is_random else {}),
        **({"prefix_len": options.prefix_len, "num_prefixes": options.num_prefixes} if options.prefix_len else {}),
        **({"turns": options.turns} if options.turns > 1 else {}),
        "output_len": options.output_len,
        **({"concurrency": load.concurrency} if load and load.concurrency else {}),
        **({"request_rate": str(load.request_rate)} if load and load.request_rate else {}),
        **({"burstiness": str(options.burstiness)} if options.burstiness != 1 else {}),
        **({"duration": options.duration_s} if options.duration_s is not None else {}),
        **({"slo": options.slo} if options.slo else {}),
        **({"remote_host": host} if host and host not in LOCAL_HOSTS else {}),
        "seed": engine.seed,
        "device": engine.device,
        "dtype": engine.dtype,
        "load_format": engine.load_format,
        "quantization": engine.quantization,
    }


def _floor(
    result: BenchResult, engine: EngineConfig, lengths: list[tuple[int, int]], batch: int
) -> dict[str, Any] | None:
    """The floor of a run on this machine's GPU; None where it is unknown or the run was not on it."""
    found = _find_floor(engine, result.environment["gpu"] if result.workload["device"] != "cpu" else None)
    return found.summary(lengths, batch) if found and lengths else None


def _find_floor(engine: EngineConfig, gpu: str | None) -> floor.Floor | None:
    """What a GPU allows; None where nobody has measured that."""
    ceilings = floor.find_ceilings(gpu)
    if ceilings is None:
        return None
    path = resolve_model(engine.model, engine.revision)
    model = ModelConfig.from_path(path)
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    if dtype == "float32":  # the matrix ceiling is for 16 bits
        return None
    return floor.Floor(model, dtype, ceilings, scheme=scheme_of_layers(model, engine.quantization, path))
