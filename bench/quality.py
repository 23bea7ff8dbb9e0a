"""What a checkpoint lost and gained against the one it was made from: on held-out text, in memory and in speed.

Perplexity tells how much worse it predicts the text, the KL divergence how far its predictions moved, whatever the text
says. Both are of the very engine that serves. What was measured is the same every time, but for the speed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.config import HELD_OUT_TEXT, QualityConfig
from bench.environment import environment
from engine.config import EngineConfig
from engine.errors import UserError
from engine.hub import resolve_model
from engine.model_config import ModelConfig
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from bench.observation import Observation

EXIT_GATE = 3
WINDOW_TOKENS = 2048
LOGITS_BYTES = 128 << 20  # of one checkpoint's logits at a time
KL_EDGES = np.logspace(-8, 2, 41)  # nats, of the histogram's bins
DEFINITIONS = {
    "perplexity": "exp of the mean nats that a token of the text costs, given those before it in its window",
    "KL": "KL(before || after) of the distribution of the next token, in nats, over all scored positions",
    "top-1 agreement": "share of the scored positions where both find the same token most likely",
    "weights in memory": "as the engine holds them, with the embedding; files may hold them otherwise, as GGUF does",
    "decode": "tokens per second of the median step that decodes a full batch",
    "prefill": "prompt tokens per second of steps full of prompts, median of up to 3 runs",
    "layer alone": "what the layer adds, given what it got before: |difference| / |what it added|, mean of tokens",
    "up to the layer": "what has been added up after the layer: |difference| / |the sum before|, mean of tokens",
}

Pair = dict[str, Any]  # {"before": ..., "after": ...}
OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class LayerError:
    """How far off one part of one layer is, relative to its size."""

    layer: int
    part: str  # "layer alone", "up to the layer" (see DEFINITIONS), or a linear layer's name, from a quantizer
    error: float


@dataclass(frozen=True)
class Quality:
    """Two checkpoints held against each other. quality.json has these fields under these names."""

    before: str  # a name
    after: str
    perplexity: Pair
    kl: dict[str, float]  # nats: mean, p50, p99, max
    top1_agreement: float  # 0 to 1
    bytes: Pair  # of the weights in the engine's memory
    file_bytes: Pair  # of the files that they came from; None: there are none
    tokens_per_s: dict[str, Pair]  # decode_1, decode_16, decode_64, prefill; None: there was no room
    layers: list[LayerError]
    kl_histogram: dict[str, list[float]]  # edges in nats, and the share of positions between each two
    text: dict[str, Any]  # name, sha256, windows, window_tokens, scored_tokens
    device: str
    dtype: str
    recipe: dict[str, Any] | None = None  # of a checkpoint that was just made: its name, the seconds it took
    environment: dict[str, Any] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=lambda: dict(DEFINITIONS))

    @property
    def ppl_increase_perc(self) -> float:
        return float((self.perplexity["after"] / self.perplexity["before"] - 1) * 100)

    def failures(self, options: QualityConfig) -> list[str]:
        """A sentence for each gate that the second checkpoint does not pass."""
        sentences = []
        if options.max_ppl_increase is not None and self.ppl_increase_perc > options.max_ppl_increase:
            before, after = self.perplexity["before"], self.perplexity["after"]
            sentences.append(
                f"the perplexity rose by {self.ppl_increase_perc:.2f}%, from {before:.2f} to {after:.2f}: "
                f"--max-ppl-increase allows {options.max_ppl_increase:g}%"
            )
        if options.max_kl is not None and self.kl["mean"] > options.max_kl:
            sentences.append(
                f"the mean KL divergence is {self.kl['mean']:.3g} nats a token: --max-kl allows {options.max_kl:g}"
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "quality", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Quality":
        """to_dict's inverse."""
        fields = {name: value for name, value in values.items() if name != "kind"}
        return cls(**(fields | {"layers": [LayerError(**layer) for layer in values["layers"]]}))


def measure(
    before: EngineConfig,
    after: EngineConfig,
    options: QualityConfig,
    *,
    layers: Sequence[LayerError] = (),
    recipe: dict[str, Any] | None = None,
    on_progress: OnProgress = lambda stage, fraction: None,
) -> Quality:
    """Hold the checkpoint `after` against `before`, each run as its config says.

    layers, recipe: what the maker of `after` knows of it. Raises UserError, and where it can before anything is loaded.
    """
    windows_ids = held_out_windows(options, before, after)

    import torch

    from bench.observation import observe

    windows = torch.tensor(windows_ids, dtype=torch.int32)
    first = observe(before, windows, lambda stage, done: on_progress(f"before: {stage}", done))
    second = observe(after, windows, lambda stage, done: on_progress(f"after: {stage}", done), first.states)
    scores = compare(windows, first, second, lambda done: on_progress("comparing", done))
    text = options.text or HELD_OUT_TEXT
    return Quality(
        before=first.name,
        after=second.name,
        perplexity={"before": scores.perplexity("before"), "after": scores.perplexity("after")},
        kl=scores.kl_figures(),
        top1_agreement=float(scores.agrees.mean()),
        bytes={"before": first.weight_bytes, "after": second.weight_bytes},
        file_bytes={"before": first.file_bytes, "after": second.file_bytes},
        tokens_per_s={
            name: {"before": rate, "after": second.tokens_per_s[name]} for name, rate in first.tokens_per_s.items()
        },
        layers=[*layer_errors(first, second), *layers],
        kl_histogram=scores.kl_histogram(),
        text={
            "name": text.name,
            "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
            "windows": len(windows),
            "window_tokens": windows.shape[1],
            "scored_tokens": len(scores.kl),
        },
        device=second.device,
        dtype=second.dtype,
        recipe=recipe,
        environment=environment(),
    )


def held_out_windows(options: QualityConfig, *models: EngineConfig) -> list[list[int]]:
    """The text's first windows as token ids, all of one length, without special tokens.

    Raises UserError if the text has not as many, or if the models do not read it alike.
    """
    text = options.text or HELD_OUT_TEXT
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text} cannot be read as UTF-8 text ({error})") from None
    paths = [resolve_model(model.model, model.revision) for model in models]
    configs = [ModelConfig.from_path(path) for path in paths]
    sizes = dict.fromkeys(config.vocab_size for config in configs)
    if len(sizes) > 1:
        raise UserError(
            f"the vocabularies have {' and '.join(f'{size:,}' for size in sizes)} tokens: "
            "quality can only be compared where they are the same"
        )
    readings = [
        Tokenizer.load(model.tokenizer or str(path), model.revision).encode(content, add_special_tokens=False)
        for model, path in zip(models, paths, strict=True)
    ]
    token_ids = readings[0]
    if any(reading != token_ids for reading in readings):
        raise UserError(
            f"{' and '.join(map(str, paths))} read {text.name} as different tokens: "
            "quality can only be compared where the tokenizers are the same"
        )
    lengths = [model.max_model_len or config.max_model_len for model, config in zip(models, configs, strict=True)]
    length = min(WINDOW_TOKENS, *lengths)
    if len(token_ids) < options.windows * length:
        raise UserError(
            f"{text} has {len(token_ids):,} tokens, but {options.windows} windows of {length:,} are to be compared: "
            f"give a longer --text or fewer --windows"
        )
    return [token_ids[first : first + length] for first in range(0, options.windows * length, length)]


@dataclass(frozen=True)
class Scores:
    """Every scored position of the text, in order."""

    nll: dict[str, np.ndarray]  # [positions] nats that the text's token costs, before and after
    kl: np.ndarray  # [positions] nats
    agrees: np.ndarray  # [positions] whether both find the same token most likely

    def perplexity(self, which: str) -> float:
        return float(np.exp(self.nll[which].mean(dtype=np.float64)))

    def kl_figures(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.kl, (50, 99))
        mean = self.kl.mean(dtype=np.float64)
        return {"mean": float(mean), "p50": float(p50), "p99": float(p99), "max": float(self.kl.max())}

    def kl_histogram(self) -> dict[str, list[float]]:
        """Values beyond the outer edges count in the outer bins."""
        counts, _ = np.histogram(self.kl.clip(KL_EDGES[0], KL_EDGES[-1]), KL_EDGES)
        return {"edges": KL_EDGES.tolist(), "shares": (counts / len(self.kl)).tolist()}


def compare(
    windows: "Tensor",
    first: "Observation",
    second: "Observation",
    on_progress: Callable[[float], None] = lambda done: None,
) -> Scores:
    """The distributions of the next token after every token of the windows [windows, length] but their last ones.

    Raises UserError for logits that are not finite.
    """
    import torch

    from bench.observation import broken

    device, length = torch.device(second.device), windows.shape[1]
    num_rows = max(LOGITS_BYTES // (4 * first.vocab_size), 1)
    parts = []
    for w, window in enumerate(windows.to(device)):
        on_progress(w / len(windows))
        for start in range(0, length - 1, num_rows):
            rows = slice(start, min(start + num_rows, length - 1))
            with torch.inference_mode():
                before, after = (
                    each.logits(each.hidden[w, rows].to(device)).log_softmax(-1) for each in (first, second)
                )
                parts.append(_score(before, after, window[rows.start + 1 : rows.stop + 1].long()).cpu())
    *nll, kl, agrees = torch.cat(parts, dim=1).numpy()
    for observation, costs in zip((first, second), nll, strict=True):
        if not np.isfinite(costs).all():
            raise broken(observation.name)
    return Scores(dict(zip(("before", "after"), nll, strict=True)), kl, agrees)


def _score(before: "Tensor", after: "Tensor", targets: "Tensor") -> "Tensor":
    """[4, n] of log probabilities [n, vocab]: nats that the targets [n] cost before and after, KL, agreement."""
    import torch

    costs = [-logs.gather(1, targets.unsqueeze(1)).squeeze(1) for logs in (before, after)]
    agrees = before.argmax(1) == after.argmax(1)
    # No divergence is below 0, but the rounding of a sum may be.
    kl = (before.exp() * (before - after)).sum(1).clamp(min=0)
    return torch.stack([*costs, kl, agrees.float()])


def layer_errors(first: "Observation", second: "Observation") -> list[LayerError]:
    """How far off each layer of the second is; nothing where the layers of the two are not alike."""
    alone, up_to = [], []
    for i, replayed in enumerate(second.replayed[1:]):
        came_in, went_out, now = first.states[i].stream, first.states[i + 1].stream, second.states[i + 1].stream
        alone.append(LayerError(i, "layer alone", _relative_error(replayed.stream - came_in, went_out - came_in)))
        up_to.append(LayerError(i, "up to the layer", _relative_error(now, went_out)))
    return alone + up_to


def _relative_error(found: "Tensor", expected: "Tensor") -> float:
    """The mean of tokens: the first of a text may be a thousand times as large as the others."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num().mean())
