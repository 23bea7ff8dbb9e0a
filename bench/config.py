"""Every knob of a benchmark, once; the engine's own stand in engine/config.py."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

DEFAULT_CONCURRENCY = 64
HELD_OUT_TEXT = Path(__file__).parent / "texts" / "persuasion.txt"
OBJECTIVES = ("ttft", "tpot", "itl", "e2el")
MIN_PROMPTS = 16
PROMPTS_PER_CLIENT = 4


@dataclass(frozen=True)
class BenchConfig:
    """What is sent, how, and where the result goes. The workload's seed is the engine's `seed`. Raises ValueError."""

    concurrency: Annotated[
        tuple[int, ...] | None,
        "requests under way at any time (closed loop); default: 64. Several, 1,16,64 or 1-64x4, are a sweep. Offline: "
        "batch of the baseline",
    ] = None
    request_rate: Annotated[
        tuple[float, ...] | None,
        "send so many requests a second, whatever comes back, instead of --concurrency; inf: all. Several: a sweep",
    ] = None
    burstiness: Annotated[
        float, "of --request-rate: 1 is Poisson, less sends in bursts, more is more regular, inf is at constant gaps"
    ] = 1.0
    num_prompts: Annotated[
        int | None, "requests to measure; default: 4 for each concurrent one, at least 16; of a trace all"
    ] = None
    duration_s: Annotated[
        float | None,
        "measure so long, going through the requests again and again; ramp-up and ramp-down are left out",
    ] = None
    slo: Annotated[
        dict[str, float] | None,
        "objectives such as ttft=500ms,itl=30ms (also tpot, e2el): goodput counts the requests that meet them all",
    ] = None
    dataset: Annotated[
        str,
        "`random` token ids, or a FILE: .jsonl lines with prompt or messages (and timestamp: a trace), ShareGPT .json, "
        "plain text lines",
    ] = "random"
    input_len: Annotated[int, "tokens in a random prompt"] = 128
    output_len: Annotated[int, "tokens to generate, where a dataset does not say"] = 64
    range_ratio: Annotated[float, "random lengths vary by this share, up and down"] = 0.0
    prefix_len: Annotated[int, "tokens before a random prompt that it shares with others"] = 0
    num_prefixes: Annotated[int, "how many such beginnings there are, taken in rotation"] = 1
    turns: Annotated[
        int, "requests of a conversation, random or ShareGPT: each is sent when the one before is answered"
    ] = 1
    url: Annotated[str, "measure the server that runs there, instead of starting one"] = ""
    api_key: Annotated[str, "bearer token for --url; better given as VCLI_API_KEY"] = field(default="", repr=False)
    offline: Annotated[bool, "no server: all prompts at once into the engine in this process"] = False
    batch_sizes: Annotated[
        tuple[int, ...] | None,
        "offline: time prefill and decode of so many sequences at once, 1,8,64 or 1-64x8, as llama-bench does",
        "--batch-size",
    ] = None
    baseline: Annotated[
        Literal["none", "transformers"], "afterwards run the same prompts through transformers' generate, and compare"
    ] = "none"
    quality: Annotated[
        str, "no load: hold MODEL against the checkpoint named here, on held-out text, in memory and in speed"
    ] = ""
    output: Annotated[
        Path | None,
        "write the result to FILE: .json, .html, .md, .csv (a line a run), .requests.csv (a line a request), .svg or "
        ".png",
    ] = None
    json: Annotated[bool, "print the result as JSON instead of a table"] = False

    def __post_init__(self) -> None:
        for name in ("concurrency", "num_prompts", "input_len", "output_len", "num_prefixes", "turns", "batch_sizes"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else [given]:
                if value is not None and value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}")
        for rate in self.request_rate or ():
            if not rate > 0:
                raise ValueError(f"request_rate must be more than 0, got {rate:g}")
        if not self.burstiness > 0:
            raise ValueError(f"burstiness must be more than 0, got {self.burstiness:g}")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ValueError(f"duration_s must be more than 0, got {self.duration_s:g}")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"range_ratio must be in [0, 1), got {self.range_ratio:g}")
        if self.prefix_len < 0:
            raise ValueError(f"prefix_len must be at least 0, got {self.prefix_len}")
        if unknown := set(self.slo or {}) - set(OBJECTIVES):
            raise ValueError(f"slo knows {', '.join(OBJECTIVES)}; got {', '.join(sorted(unknown))}")
        self._check_together()

    def _check_together(self) -> None:
        if self.turns > 1 and (self.offline or self.baseline != "none"):
            other = "--offline" if self.offline else "--baseline"
            raise ValueError(f"--turns and {other} exclude each other: a batch has no next turn")
        if self.batch_sizes is not None:
            self._check_batch_sizes()
        if self.burstiness != 1 and self.request_rate is None:
            raise ValueError("--burstiness needs --request-rate: a closed loop sends when it has an answer")
        if self.duration_s is not None and math.inf in (self.request_rate or ()):
            raise ValueError("--duration and --request-rate inf exclude each other: there is no end to what is sent")
        if self.offline and (self.duration_s is not None or self.slo):
            other = "--slo" if self.slo else "--duration"
            raise ValueError(f"--offline and {other} exclude each other: there are no requests of a client to time")
        if self.baseline != "none" and self.is_sweep:
            raise ValueError("--baseline needs one --concurrency: it is compared with one run")
        if self.offline and self.is_sweep:
            raise ValueError("--offline needs one --concurrency: all prompts are there at once")
        if self.request_rate is not None and (self.concurrency is not None or self.offline):
            other = "--offline" if self.offline else "--concurrency"
            raise ValueError(f"--request-rate and {other} exclude each other: an open loop does not wait for answers")
        if self.url and self.offline:
            raise ValueError("--url and --offline exclude each other: one measures a server, the other needs none")
        if self.url and self.baseline != "none":
            raise ValueError("--baseline needs the weights on this machine: it cannot be combined with --url")
        if self.quality and (self.url or self.offline or self.baseline != "none"):
            other = "--url" if self.url else "--offline" if self.offline else "--baseline"
            raise ValueError(
                f"--quality and {other} exclude each other: quality is measured by itself, in this process"
            )

    def _check_batch_sizes(self) -> None:
        if not self.offline or self.baseline != "none" or self.dataset != "random":
            raise ValueError("--batch-size needs --offline, random prompts, and no --baseline")
        for name in ("concurrency", "num_prompts", "range_ratio", "prefix_len"):
            if getattr(self, name) not in (None, 0):
                raise ValueError(
                    f"--batch-size and --{name.replace('_', '-')} exclude each other: a batch is so many prompts of "
                    "--input-len tokens, with nothing in common"
                )

    @property
    def is_sweep(self) -> bool:
        return len(self.concurrency or self.request_rate or ()) > 1

    def points(self) -> list["BenchConfig"]:
        """One config for each run of a sweep."""
        if self.concurrency is not None:
            return [replace(self, concurrency=(each,)) for each in self.concurrency]
        return [replace(self, request_rate=(rate,)) for rate in self.request_rate or ()] or [self]

    @property
    def batch_size(self) -> int:
        """Requests under way at once: of a closed loop, and of the baseline."""
        return (self.concurrency or (DEFAULT_CONCURRENCY,))[0]

    @property
    def num_requests(self) -> int:
        return self.num_prompts or max(MIN_PROMPTS, PROMPTS_PER_CLIENT * self.batch_size)


@dataclass(frozen=True)
class QualityConfig:
    """On what text two checkpoints are compared, and how far apart they may be. Raises ValueError."""

    text: Annotated[Path | None, "held-out text to compare on, UTF-8; default: the first chapters of Persuasion"] = None
    windows: Annotated[int, "pieces of 2,048 tokens of the text (or of the model's length) to compare on"] = 8
    max_ppl_increase: Annotated[
        float | None, "gate: exit code 3 if the perplexity rises by more than so many percent"
    ] = None
    max_kl: Annotated[
        float | None, "gate: exit code 3 if the mean KL divergence of the next token is more than so many nats"
    ] = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}")
        for name in ("max_ppl_increase", "max_kl"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value:g}")


@dataclass(frozen=True)
class GateConfig:
    """What a gate compares, on what load, and when it is passed. Raises ValueError."""

    metric: Annotated[
        tuple[str, ...],
        "how much a figure may change: `p99_itl<=+5%`, `throughput>=-3%`, or FILE.toml with a table [metrics] of them",
    ] = ("throughput>=-5%",)
    baseline: Annotated[
        Path | None, "a result (.json) of `vcli bench` or of a gate: its load is run again, on its revision and on this"
    ] = None
    against: Annotated[
        str,
        "what to measure beside this code: a git revision, the URL of a server, `transformers` (its generate, which "
        "tells throughput alone), or `recorded`: the trials that a gate left in --baseline; default: its revision",
    ] = ""
    budget_s: Annotated[float, "give up undecided after this time"] = 600.0
    concurrency: Annotated[int | None, "requests under way at any time; default: those of --baseline, or 16"] = None
    num_prompts: Annotated[int | None, "requests of a trial; default: 2 for each concurrent one"] = None
    dataset: Annotated[str, "as in `vcli bench`: `random` token ids, or a FILE of prompts"] = "random"
    input_len: Annotated[int | None, "tokens in a random prompt; default: those of --baseline, or 128"] = None
    output_len: Annotated[int | None, "tokens to generate; default: those of --baseline, or 64"] = None
    url: Annotated[str, "measure the server that runs there as this code, instead of starting one"] = ""
    api_key: Annotated[str, "bearer token for servers given by URL; better given as VCLI_API_KEY"] = field(
        default="", repr=False
    )
    output: Annotated[
        tuple[str, ...], "write the result to FILE: .json (the next --baseline), .xml (JUnit) or .md; may be repeated"
    ] = ()
    json: Annotated[bool, "print the result as JSON instead of a table"] = False

    def __post_init__(self) -> None:
        for name in ("concurrency", "num_prompts", "input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.budget_s > 0:
            raise ValueError(f"budget_s must be more than 0, got {self.budget_s:g}")


@dataclass(frozen=True)
class ProfileConfig:
    """What the engine does while it is watched, and where the result goes. Raises ValueError."""

    url: Annotated[str, "watch the server that runs there, under the load that others give it"] = ""
    api_key: Annotated[str, "bearer token for --url; better given as VCLI_API_KEY"] = field(default="", repr=False)
    concurrency: Annotated[int, "requests under way at any time"] = DEFAULT_CONCURRENCY
    dataset: Annotated[str, "`random` token ids, or a FILE of prompts, as of `vcli bench`"] = "random"
    input_len: Annotated[int, "tokens in a random prompt"] = 128
    output_len: Annotated[int, "tokens to generate, where a dataset does not say"] = 64
    duration_s: Annotated[float, "how long to watch; a second run checks the advice, as long again"] = 10.0
    check: Annotated[bool, "start the engine again as the first advice says, and measure what it brings"] = True
    trace: Annotated[Path | None, "write some steps as a Chrome trace (Perfetto reads it): .json or .json.gz"] = None
    output: Annotated[Path | None, "write the result to FILE: .html or .json"] = None
    json: Annotated[bool, "print the result as JSON instead of tables"] = False

    def __post_init__(self) -> None:
        for name in ("concurrency", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("concurrency", "dataset", "input_len", "output_len", "trace") if self.url else ():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--url and --{name.replace('_', '-')} exclude each other: a server is watched from outside, under "
                    "the load that others give it"
                )
        if not self.duration_s > 0:
            raise ValueError(f"duration_s must be more than 0, got {self.duration_s:g}")
        for name, endings in (("trace", (".json", ".json.gz")), ("output", (".html", ".json"))):
            path = getattr(self, name)
            if path is not None and not path.name.endswith(endings):
                raise ValueError(f"{name} must end in {' or '.join(endings)}, got {path}")


@dataclass(frozen=True)
class CompareConfig:
    """Which engines are compared, and on what load. Raises ValueError."""

    engines: Annotated[
        tuple[str, ...],
        "vcli, vllm, sglang, lmdeploy, tensorrt-llm, transformers (its server), transformers-generate, or the URL of a "
        "server; ratios are to the first",
    ] = ("vcli", "vllm", "sglang", "lmdeploy", "tensorrt-llm", "transformers")
    env: Annotated[
        tuple[str, ...], "ENGINE=PATH: the virtual environment that an engine is installed in; may be repeated"
    ] = ()
    starts: Annotated[int, "how often each engine is started; every other time in the opposite order"] = 2
    trials: Annotated[int, "runs of the load after each start"] = 3
    concurrency: Annotated[int, "requests under way at any time"] = 16
    num_prompts: Annotated[int | None, "requests of a trial; default: 4 for each concurrent one, at least 16"] = None
    dataset: Annotated[str, "as in `vcli bench`: `random` token ids, or a FILE of prompts"] = "random"
    input_len: Annotated[int, "tokens in a random prompt"] = 128
    output_len: Annotated[int, "tokens to generate, where a dataset does not say"] = 64
    api_key: Annotated[str, "bearer token for servers given by URL; better given as VCLI_API_KEY"] = field(
        default="", repr=False
    )
    output: Annotated[
        tuple[str, ...], "write the result to FILE: .json, .html, .md, .csv, .svg or .png; may be repeated"
    ] = ()
    json: Annotated[bool, "print the result as JSON instead of a table"] = False

    def __post_init__(self) -> None:
        for name in ("starts", "trials", "concurrency", "num_prompts", "input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.engines:
            raise ValueError("engines must name at least one")
        for pair in self.env:
            name, _, folder = pair.partition("=")
            if not Path(folder).expanduser().joinpath("bin", "python").exists():
                raise ValueError(f"env must be ENGINE=PATH of a virtual environment with bin/python, got {pair!r}")
            if name not in self.engines:
                raise ValueError(f"env {name}: --engines names no such engine")

    def environments(self) -> dict[str, Path]:
        return {name: Path(folder).expanduser() for name, _, folder in (pair.partition("=") for pair in self.env)}
