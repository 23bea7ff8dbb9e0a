"""Every knob of a benchmark, once; the engine's own stand in engine/config.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

DEFAULT_CONCURRENCY = 64
HELD_OUT_TEXT = Path(__file__).parent / "texts" / "persuasion.txt"
MIN_PROMPTS = 16
PROMPTS_PER_CLIENT = 4


@dataclass(frozen=True)
class BenchConfig:
    """What is sent, how, and where the result goes. The workload's seed is the engine's `seed`. Raises ValueError."""

    concurrency: Annotated[
        int | None, "requests under way at any time (closed loop); default: 64. Offline: batch of the baseline"
    ] = None
    request_rate: Annotated[
        float | None,
        "send so many requests a second (Poisson), whatever comes back, instead of --concurrency; inf: all",
    ] = None
    num_prompts: Annotated[int | None, "requests to measure; default: 4 for each concurrent one, at least 16"] = None
    dataset: Annotated[
        str, "`random` token ids, or a FILE: .jsonl lines with prompt or messages, ShareGPT .json, plain text lines"
    ] = "random"
    input_len: Annotated[int, "tokens in a random prompt"] = 128
    output_len: Annotated[int, "tokens to generate, where a dataset does not say"] = 64
    range_ratio: Annotated[float, "random lengths vary by this share, up and down"] = 0.0
    url: Annotated[str, "measure the server that runs there, instead of starting one"] = ""
    api_key: Annotated[str, "bearer token for --url; better given as VCLI_API_KEY"] = field(default="", repr=False)
    offline: Annotated[bool, "no server: all prompts at once into the engine in this process"] = False
    baseline: Annotated[
        Literal["none", "transformers"], "afterwards run the same prompts through transformers' generate, and compare"
    ] = "none"
    quality: Annotated[
        str, "no load: hold MODEL against the checkpoint named here, on held-out text, in memory and in speed"
    ] = ""
    output: Annotated[Path | None, "write the result to FILE: .json, .csv, .md or .html"] = None
    json: Annotated[bool, "print the result as JSON instead of a table"] = False

    def __post_init__(self) -> None:
        limits = (("concurrency", 1), ("num_prompts", 1), ("input_len", 1), ("output_len", 1))
        for name, smallest in limits:
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ValueError(f"--request-rate must be more than 0, got {self.request_rate:g}")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"--range-ratio must be in [0, 1), got {self.range_ratio:g}")
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

    @property
    def batch_size(self) -> int:
        """Requests under way at once: of a closed loop, and of the baseline."""
        return self.concurrency or DEFAULT_CONCURRENCY

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
