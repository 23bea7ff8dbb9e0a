"""What a model is, in typed numbers read once from its config.json or GGUF metadata.

Everything a layer must know about its family's habits (biases, norms, windows, soft caps, rotary scaling) is a field
here, so that no layer asks for a model's name. Imports no torch: the API process reads it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from engine.errors import UserError
from engine.sampling_params import Pooling

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DTYPES = ("bfloat16", "float16", "float32")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True)
class RopeConfig:
    """One set of rotary frequencies and how they are stretched; layers/rotary.py turns it into a table."""

    theta: float
    rotary_dim: int  # the first so many numbers of a head are rotated
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_len: int = 0  # context of the training before stretching
    attention_factor: float = 1.0  # multiplies cosines and sines
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: one divisor a frequency, up to original_max_len and beyond it
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape and habits of one model. A field says what is, never what was asked for on the command line."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int  # tokens the model was made for
    dtype: str  # of the checkpoint
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    layer_windows: tuple[int, ...]  # tokens each layer looks back on, itself included; 0: all
    layer_ropes: tuple[RopeConfig | None, ...]  # None: the layer has no positions (SmolLM3)
    rms_norm_eps: float
    activation: str  # silu or gelu_tanh
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    has_qk_norm: bool = False
    attention_scale: float = 1.0
    attention_softcap: float = 0.0  # 0: none
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    quantization: Mapping[str, Any] = field(default_factory=dict, hash=False)  # quantization_config, as it is there
    default_sampling: tuple[tuple[str, float], ...] = ()  # what a request that does not say gets, by parameter
    default_pooling: Pooling = "last"  # of an embedding

    @classmethod
    def from_path(cls, path: Path) -> ModelConfig:
        """The config of a folder with config.json, or of a GGUF file. Raises UserError.

        A generation_config.json and sentence-transformers' 1_Pooling/config.json are read where there are any, beside
        a GGUF file too.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            from engine.gguf import GGUFFile

            config = _Fields(GGUFFile(path).hugging_face_config(), path)
            return _read(config, *_further_configs(path.parent))
        file = path / "config.json"
        if not file.is_file():
            raise UserError(f"{path} holds no config.json: give the folder of a Hugging Face model or a .gguf file")
        values = load_json(file)
        if "quantization_config" not in values and (path / "quantize_config.json").is_file():  # of an early AutoGPTQ
            values["quantization_config"] = {"quant_method": "gptq"} | load_json(path / "quantize_config.json")
        return _read(_Fields(values, file), *_further_configs(path))


class _Fields:
    """Typed reading of a config.json; a missing or misspelt value is the person's to mend."""

    def __init__(self, values: dict[str, Any], source: Path) -> None:
        self.values, self.source = values, source

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"{self.source}: {name} is {value!r}, but must be a positive whole number")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.source}: {name} is {value!r}, but must be a number")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.source}: {name} is {value!r}, but must be an object")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.get(name, default))


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises UserError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download the model again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def _further_configs(folder: Path) -> list[_Fields]:
    """How to generate, and how to pool hidden states, if the folder says it."""
    files = (folder / "generation_config.json", folder / "1_Pooling" / "config.json")
    return [_Fields(load_json(file) if file.is_file() else {}, file) for file in files]


def _default_sampling(generation: _Fields) -> tuple[tuple[str, float], ...]:
    """What the model's authors recommend, as vLLM takes it; do_sample: false asks for the most likely tokens."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    given = {name: generation.number(name, 0) for name in names if generation.get(name) is not None}
    if generation.get("top_k") is not None:
        given["top_k"] = int(generation.number("top_k", 0))
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    return tuple(given.items())


def _default_pooling(pooling: _Fields) -> Pooling:
    """That of a model made for embeddings, by sentence-transformers 5 or older; others were trained on last tokens."""
    is_mean = pooling.flag("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean"
    return "mean" if is_mean else "last"


def _read(c: _Fields, generation: _Fields, pooling: _Fields) -> ModelConfig:
    architecture = _architecture(c)
    outer = c
    c = _Fields(c.values | c.mapping("text_config"), c.source)  # of a model that also sees: its text part
    defaults, habits = FAMILIES[architecture]
    c = _Fields(defaults | c.values, c.source)

    num_layers, num_heads = c.count("num_hidden_layers"), c.count("num_attention_heads")
    num_kv_heads = c.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"{c.source}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
    head_dim = c.count("head_dim", c.count("hidden_size") // num_heads)
    windows = _layer_windows(c, num_layers)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": c.count("vocab_size"),
        "hidden_size": c.count("hidden_size"),
        "intermediate_size": c.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_model_len": _max_model_len(c),
        "dtype": _dtype(c),
        "eos_token_ids": _token_ids(*(source.get("eos_token_id") for source in (generation, c, outer))),
        "tie_word_embeddings": c.flag("tie_word_embeddings"),
        "layer_windows": windows,
        "layer_ropes": _layer_ropes(c, head_dim, windows),
        "rms_norm_eps": c.number("rms_norm_eps", 1e-6),
        "activation": _activation(c),
        "attention_scale": head_dim**-0.5,
        "quantization": MappingProxyType(c.mapping("quantization_config")),
        "default_sampling": _default_sampling(generation),
        "default_pooling": _default_pooling(pooling),
    }
    return ModelConfig(**(fields | habits(c)))


def _architecture(c: _Fields) -> str:
    named = [str(name) for name in c.get("architectures", [])]
    supported = next((name for name in named if name in FAMILIES), None)
    if supported is None:
        what = f"architecture {', '.join(named)} is not supported" if named else "names no architecture"
        raise UserError(f"{c.source}: {what}; supported are {', '.join(FAMILIES)}")
    return supported


def _llama(c: _Fields) -> dict[str, Any]:
    bias = c.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": c.flag("mlp_bias")}


def _qwen2(c: _Fields) -> dict[str, Any]:
    return {"qkv_bias": True}


def _qwen3(c: _Fields) -> dict[str, Any]:
    return _llama(c) | {"has_qk_norm": True}


def _gemma2(c: _Fields) -> dict[str, Any]:
    if c.flag("use_bidirectional_attention"):
        raise UserError(f"{c.source}: bidirectional attention is not supported: this model makes no text")
    return _llama(c) | {
        "attention_scale": c.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": c.number("attn_logit_softcapping", 0.0),
        "final_softcap": c.number("final_logit_softcapping", 0.0),
        "embedding_scale": math.sqrt(c.count("hidden_size")),
    }


def _gemma3(c: _Fields) -> dict[str, Any]:
    return _gemma2(c) | {"has_qk_norm": True}


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "sliding_window": 4096}
_GEMMA2 = _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2}
_GEMMA3 = _GEMMA | {  # published configs leave out what equals transformers' defaults
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
_SMOLLM3 = {"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4}

# architecture: what its config.json may leave out, and its habits as fields of ModelConfig
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[_Fields], dict[str, Any]]]] = {
    "LlamaForCausalLM": ({}, _llama),
    "MistralForCausalLM": ({"sliding_window": 4096, "num_key_value_heads": 8}, lambda c: {}),
    "Qwen2ForCausalLM": ({"max_window_layers": 28}, _qwen2),
    "Qwen3ForCausalLM": ({"head_dim": 128, "max_window_layers": 28}, _qwen3),
    "Gemma2ForCausalLM": (_GEMMA2 | {"head_dim": 256}, _gemma2),
    "Gemma3ForCausalLM": (_GEMMA3, _gemma3),
    "Gemma3ForConditionalGeneration": (_GEMMA3, _gemma3),
    "Phi3ForCausalLM": ({"rms_norm_eps": 1e-5}, lambda c: {}),
    "SmolLM3ForCausalLM": (_SMOLLM3, _llama),
}


def _layer_windows(c: _Fields, num_layers: int) -> tuple[int, ...]:
    """How far each layer looks back: said layer by layer, by a pattern, from some layer on, or for all."""
    window = c.get("sliding_window")
    if not window or c.get("use_sliding_window") is False:
        return (0,) * num_layers
    if c.get("use_sliding_window") is None and "max_window_layers" in c.values:  # Qwen: off unless said
        return (0,) * num_layers
    window = c.count("sliding_window")
    if types := c.get("layer_types"):
        if len(types) != num_layers:
            raise UserError(f"{c.source}: layer_types names {len(types)} layers of {num_layers}")
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    if pattern := c.get("sliding_window_pattern"):  # every so many-th layer sees all
        return tuple(window if (i + 1) % pattern else 0 for i in range(num_layers))
    first = c.get("max_window_layers", 0)
    return tuple(window if i >= first else 0 for i in range(num_layers))


def _layer_ropes(c: _Fields, head_dim: int, windows: tuple[int, ...]) -> tuple[RopeConfig | None, ...]:
    """Reads `rope_theta` with `rope_scaling`, and `rope_parameters` (flat, or one set for each type of layer)."""
    parameters = c.mapping("rope_parameters")
    if not any(isinstance(value, dict) for value in parameters.values()):
        parameters = {"full_attention": parameters | c.mapping("rope_scaling")}
    everywhere = in_windows = _rope(c, parameters.get("full_attention") or {}, head_dim)
    local = parameters.get("sliding_attention") or {}
    if local_theta := local.get("rope_theta") or c.get("rope_local_base_freq"):
        in_windows = _rope(c, local | {"rope_theta": local_theta}, head_dim)
    has_rope = c.get("no_rope_layers")  # 1: rotated
    if has_rope is None:
        interval = c.get("no_rope_layer_interval")
        has_rope = [not interval or (i + 1) % interval for i in range(len(windows))]
    return tuple(
        (in_windows if window else everywhere) if rotated else None
        for window, rotated in zip(windows, has_rope, strict=False)
    )


def _rope(c: _Fields, values: dict[str, Any], head_dim: int) -> RopeConfig:
    p = _Fields(values, c.source)
    theta = p.number("rope_theta", c.number("rope_theta", 10_000.0))
    partial = p.number("partial_rotary_factor", c.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    kind = p.get("rope_type", p.get("type", "default"))
    if kind == "su" or (kind == "yarn" and p.get("short_factor")):  # earlier names of Phi-3's
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise UserError(f"{c.source}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return RopeConfig(theta, rotary_dim)
    max_len = c.count("max_position_embeddings")
    original = max_len
    if kind != "dynamic":  # whose scaling starts where config.json says that the model ends
        original = c.get("original_max_position_embeddings") or p.count("original_max_position_embeddings", max_len)
    factor = p.number("factor", max_len / original)
    short, long = (tuple(map(float, p.get(name, ()))) for name in ("short_factor", "long_factor"))
    if kind == "longrope" and not len(short) == len(long) == rotary_dim // 2:
        raise UserError(
            f"{c.source}: longrope needs {rotary_dim // 2} short and long factors, not {len(short)} and {len(long)}"
        )
    return RopeConfig(
        theta,
        rotary_dim,
        kind=kind,
        factor=factor,
        original_max_len=original,
        attention_factor=_attention_factor(p, kind, factor, original),
        low_freq_factor=p.number("low_freq_factor", 1.0),
        high_freq_factor=p.number("high_freq_factor", 4.0),
        beta_fast=p.number("beta_fast", 32.0),
        beta_slow=p.number("beta_slow", 1.0),
        truncate=p.flag("truncate", True),
        short_factors=short,
        long_factors=long,
    )


def _attention_factor(p: _Fields, kind: str, factor: float, original: int) -> float:
    """What yarn (arXiv 2309.00071, section 3.4) and longrope (arXiv 2402.13753) multiply cosines and sines by."""
    if kind not in ("yarn", "longrope") or factor <= 1:
        return p.number("attention_factor", 1.0) if kind in ("yarn", "longrope") else 1.0
    if p.get("attention_factor") is not None:
        return p.number("attention_factor", 1.0)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    scales = [0.1 * p.number(name, 0.0) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")]
    return scales[0] / scales[1] if p.get("mscale") and p.get("mscale_all_dim") else 0.1 * math.log(factor) + 1


def _max_model_len(c: _Fields) -> int:
    """max_position_embeddings, but for yarn: there the published configs may still say the length before stretching."""
    max_len = c.count("max_position_embeddings")
    p = _Fields(c.mapping("rope_parameters") | c.mapping("rope_scaling"), c.source)
    if p.get("rope_type", p.get("type")) != "yarn" or not p.get("original_max_position_embeddings"):
        return max_len
    return max(max_len, int(p.count("original_max_position_embeddings") * p.number("factor", 1.0)))


def _activation(c: _Fields) -> str:
    name = c.get("hidden_activation") or c.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UserError(f"{c.source}: activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _dtype(c: _Fields) -> str:
    name = str(c.get("dtype", c.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{c.source}: dtype {name!r} is not supported; supported are {', '.join(DTYPES)}")
    return name


def _token_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    """All ids of all sources, each once, in order."""
    ids = [i for source in sources if source is not None for i in (source if isinstance(source, list) else [source])]
    return tuple(dict.fromkeys(ids))
