"""GGUF, llama.cpp's one-file format: its header, and its tensors by their Hugging Face names and conventions.

The header is read here, because the `gguf` package takes seconds for a large vocabulary; types and dequantization are
the package's. What llama.cpp changes on the way in is undone on the way out: the order of rotary pairs in q and k of
Llama, and the 1 added to Gemma's norms.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
PERMUTED = ("llama", "smollm3")  # llama.cpp rotates neighbours there, and reorders the rows of q and k for it
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PHI3_NAMES = LAYER_NAMES | {"mlp.gate_up_proj": "ffn_up"}

CHUNK_NUMBERS = 1 << 20  # dequantized at a time: what a CPU's cache holds
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]  # as in torch: rows first
    type_id: int
    offset: int  # from the start of the file


class GGUFFile:
    """A GGUF file, its header read and its tensors left on disk until asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self.data = np.memmap(path, dtype=np.uint8, mode="r")
            self._read_header()
        except (OSError, struct.error, ValueError, KeyError) as error:
            raise UserError(f"{path} is not a whole GGUF file ({error}): download it again") from error
        self.family = str(self.metadata.get("general.architecture"))
        if self.metadata.get("split.count", 0) > 1:
            raise UserError(f"{path} is one of several parts: join them with `llama-gguf-split --merge` first")

    def _read_header(self) -> None:
        cursor = _Cursor(self.data.data)
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version, num_tensors, num_pairs = cursor.unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or of a big-endian machine")
        for _ in range(num_pairs):
            key, kind = cursor.string(), cursor.unpack("I")[0]
            self.metadata[key] = cursor.value(kind)
        found = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.unpack("I")[0]
            found.append((name, cursor.unpack(f"{num_dims}Q")[::-1], *cursor.unpack("IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {name: StoredTensor(shape, kind, start + offset) for name, shape, kind, offset in found}
        self.num_bytes = len(self.data) - start

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self.tensors.get(self._stored_name(name))
        return tensor.shape if tensor else None

    def has_layer(self, name: str) -> bool:
        return self.shape(f"{name}.weight") is not None

    def whole(self, name: str) -> tuple[Tensor, int]:
        import torch

        shape = self.tensors[self._stored_name(name)].shape
        found = torch.empty(shape)
        whole = tuple(slice(0, length) for length in shape)
        return found, sum(job() for job in self.jobs(name, whole, found, 0.0))

    def jobs(self, name: str, index: tuple[slice, ...], into: Tensor, plus: float) -> Iterator[Callable[[], int]]:
        tensor = self.tensors[self._stored_name(name)]
        stored = self._rows(name, tensor)
        has_pairs = self.family in PERMUTED and (".q_proj." in name or ".k_proj." in name)
        if self.family.startswith("gemma") and name.endswith("norm.weight"):
            plus -= 1
        if len(tensor.shape) == 1:
            yield partial(self._read, tensor, stored, index, has_pairs, into, plus)
            return
        stored, cut = stored[index[0]], (slice(None), *index[1:])
        step = max(1, CHUNK_NUMBERS // tensor.shape[-1])
        if has_pairs:
            step = -(-step // self._head_dim) * self._head_dim  # whole heads
        for start in range(0, len(stored), step):
            rows, place = stored[start : start + step], into[start : start + step]
            yield partial(self._read, tensor, rows, cut, has_pairs, place, plus)

    def close(self) -> None:
        """Jobs leave nothing open."""

    def _read(
        self, tensor: StoredTensor, stored: np.ndarray, cut: tuple[slice, ...], has_pairs: bool, into: Tensor,
        plus: float,
    ) -> int:  # fmt: skip
        """Stored rows, worked out and cut, into their place. Returns the bytes read."""
        import torch

        values = self._dequantize(stored, tensor).reshape(-1, *tensor.shape[1:])
        if has_pairs:
            values = self._restore_pairs(values)
        into.copy_(torch.from_numpy(values[cut]))
        if plus:
            into += plus
        return stored.nbytes

    def _stored_name(self, name: str) -> str:
        """model.layers.3.mlp.up_proj.weight → blk.3.ffn_up.weight"""
        stem, _, kind = name.rpartition(".")
        if stem in TOP_NAMES:
            return f"{TOP_NAMES[stem]}.{kind}"
        names = GEMMA_NAMES if self.family.startswith("gemma") else PHI3_NAMES if self.family == "phi3" else LAYER_NAMES
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{names.get(part, part)}.{kind}"

    def _rows(self, name: str, tensor: StoredTensor) -> np.ndarray:
        """The stored bytes, [rows, bytes a row]."""
        try:
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_id)]
        except (ValueError, KeyError) as error:
            message = f"{self.path}: tensor {name} has unknown type {tensor.type_id}: use a Q8_0 or Q4_K file"
            raise UserError(message) from error
        row_bytes = tensor.shape[-1] // block_size * block_bytes
        num_rows = prod(tensor.shape[:-1])
        stored = self.data[tensor.offset : tensor.offset + num_rows * row_bytes]
        if len(stored) < num_rows * row_bytes:
            raise UserError(f"{self.path} is cut short (tensor {name} is missing bytes): download it again")
        return stored.reshape(num_rows, row_bytes)

    def _dequantize(self, rows: np.ndarray, tensor: StoredTensor) -> np.ndarray:
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        try:
            values = gguf.dequantize(rows.reshape(1, -1), kind)  # as one row: the package works on 16 at a time
        except NotImplementedError as error:
            raise UserError(f"{self.path}: type {kind.name} is not supported: use a Q8_0 or Q4_K file") from error
        return np.require(values, np.float32, "W").reshape(len(rows), -1)

    def _restore_pairs(self, values: np.ndarray) -> np.ndarray:
        """Rows of each head from the order 0, d/2, 1, d/2 + 1, ... back to 0, 1, 2, ..."""
        pairs = values.reshape(-1, self._head_dim // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    @cached_property
    def _head_dim(self) -> int:
        default = self._get("embedding_length") // self._get("attention.head_count")
        return self._get("attention.key_length", default)

    def _get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.family}.{key}", default)

    def hugging_face_config(self) -> dict[str, Any]:
        """The config.json that the model would have. Raises UserError for an architecture we do not know."""
        special = {name: self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
        embedding = self.tensors.get("token_embd.weight")
        config = {
            "architectures": [ARCHITECTURES.get(self.family, f"{self.family} (GGUF)")],
            "model_type": "gemma3_text" if self.family == "gemma3" else self.family,
            "vocab_size": embedding.shape[0] if embedding else None,
            "hidden_size": self._get("embedding_length"),
            "intermediate_size": self._get("feed_forward_length"),
            "num_hidden_layers": self._get("block_count"),
            "num_attention_heads": self._get("attention.head_count"),
            "num_key_value_heads": self._get("attention.head_count_kv"),
            "head_dim": self._get("attention.key_length"),
            "max_position_embeddings": self._get("context_length"),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._get("rope.freq_base"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": special["bos"],
            "eos_token_id": [i for i in (special["eos"], special["eot"]) if i is not None],
            "attn_logit_softcapping": self._get("attn_logit_softcapping"),
            "final_logit_softcapping": self._get("final_logit_softcapping"),
            "sliding_window": self._get("attention.sliding_window") or None,
            "attention_bias": "blk.0.attn_output.bias" in self.tensors,
            "dtype": "bfloat16",
        }
        config = {key: value for key, value in config.items() if value is not None}
        if rotary_dim := self._get("rope.dimension_count"):
            config["partial_rotary_factor"] = rotary_dim / self._head_dim
        if self.family.startswith("gemma"):  # the two of 27 billion numbers scale by the width of a head's share
            is_27b = self._get("block_count") in (46, 62)
            share = self._get("embedding_length") // self._get("attention.head_count")
            config["query_pre_attn_scalar"] = share if is_27b else self._head_dim
        scaling = self._rope_scaling()
        return config | {"rope_scaling": scaling} if scaling else config

    def _rope_scaling(self) -> dict[str, Any]:
        original = self._get("rope.scaling.original_context_length", self._get("context_length"))
        scaling = {"factor": self._get("rope.scaling.factor", 1.0), "original_max_position_embeddings": original}
        if "rope_factors_long.weight" in self.tensors:
            long, short = (self._vector(f"rope_factors_{kind}.weight") for kind in ("long", "short"))
            factor = self._get("rope.scaling.attn_factor", 1.0)
            return scaling | {
                "type": "longrope",
                "long_factor": long,
                "short_factor": short,
                "attention_factor": factor,
            }
        if "rope_freqs.weight" in self.tensors:  # Llama 3.1's scaling, worked out: a divisor for each frequency
            divisors = self._vector("rope_freqs.weight")
            return scaling | {
                "type": "longrope",
                "long_factor": divisors,
                "short_factor": divisors,
                "attention_factor": 1.0,
            }
        kind = self._get("rope.scaling.type", "none")
        return scaling | {"type": kind} if kind in ("linear", "yarn") else {}

    def _vector(self, name: str) -> list[float]:
        tensor = self.tensors[name]
        return self._dequantize(self._rows(name, tensor), tensor).flatten().tolist()


class _Cursor:
    """Walks over the header: little-endian numbers, strings with their length before them."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> memoryview:
        if self.at + length > len(self.data):
            raise ValueError("it ends within the header")
        self.at += length
        return self.data[self.at - length : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def string(self) -> str:
        return str(self.take(self.unpack("Q")[0]), "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.unpack(SCALARS[kind])[0]
        item_kind, length = self.unpack("IQ")
        if item_kind in SCALARS:
            return list(self.unpack(f"{length}{SCALARS[item_kind]}"))
        return [self.value(item_kind) for _ in range(length)]
