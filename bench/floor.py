"""What the hardware allows: the least time a decode step, a prefill or a whole run can take.

Decode reads every weight once (the embedding table is looked up, not read; the output head is read) and the KV of
every running token; where the matrix work of the batch takes longer than the weights' read, it takes its place. Prefill
is the matrix work of the linear layers and of causal attention. Quantized layers are read in their few bits, with
scales and zeros; where inputs are rounded to e4m3 too, their products have its rate. The ceilings are measured, not
from a data sheet.
"""

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from engine.model_config import ModelConfig
from engine.quantization.weight import Scheme

DTYPE_BYTES = {"fp8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches when it does one thing only."""

    name: str
    bytes_per_s: float
    flops_per_s: float  # bf16 or fp16 matrix products
    fp8_flops_per_s: float  # e4m3 matrix products


# Measured on one NVIDIA H200 (driver 580.159, CUDA 13.0): the sum of 8 GB by a persistent kernel, and a bf16 product
# of two 8192 x 8192 matrices of random numbers; of e4m3 with fast accumulation.
H200 = Ceilings(name="H200", bytes_per_s=4.69e12, flops_per_s=752e12, fp8_flops_per_s=1517e12)
CEILINGS = (H200,)


def find_ceilings(gpu: str | None) -> Ceilings | None:
    """The ceilings of a GPU by the name that nvidia-smi gives it; None where nobody has measured them."""
    return next((c for c in CEILINGS if gpu and c.name in gpu.split()), None)


def layer_matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a layer: outputs and inputs."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": (heads + 2 * kv_heads, model.hidden_size),
        "o": (model.hidden_size, heads),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
    }


def num_params(model: ModelConfig) -> dict[str, int]:
    """Of the matrices of all layers, and of the output head."""
    of_layer = {name: outputs * inputs for name, (outputs, inputs) in layer_matrices(model).items()}
    num_head = model.vocab_size * model.hidden_size
    return {name: model.num_layers * num for name, num in of_layer.items()} | {"logits": num_head}


def weight_bytes(model: ModelConfig, dtype: str, scheme: Scheme | None) -> float:
    """Of a number in the layers, with its share of a 16-bit scale and of a zero."""
    if scheme is None:
        return DTYPE_BYTES[dtype]
    in_block = (scheme.block[0] or model.hidden_size) * (scheme.block[1] or model.hidden_size)
    grid_bits = 16 + (0 if scheme.is_symmetric else scheme.bits)
    return (scheme.bits + grid_bits / in_block) / 8


@dataclass(frozen=True)
class Floor:
    """The least times of one model on one device. Lengths are in tokens, times in seconds."""

    model: ModelConfig
    dtype: str
    ceilings: Ceilings
    kv_dtype: str = "auto"  # auto: as dtype
    scheme: Scheme | None = None  # of the layers' weights; the output head is never quantized

    @property
    def num_params(self) -> dict[str, int]:
        """Read in a decode step, by matrix: those of all layers, and the output head."""
        return num_params(self.model)

    @property
    def num_decode_params(self) -> int:
        """Read in a decode step: the layers and the output head."""
        return sum(self.num_params.values())

    def kv_bytes(self, context: float) -> float:
        """Keys and values that one token reads when it sits at the end of `context` tokens."""
        c = self.model
        tokens = sum(min(context, window) if window else context for window in c.layer_windows)
        dtype = self.dtype if self.kv_dtype == "auto" else self.kv_dtype
        return 2 * c.num_kv_heads * c.head_dim * DTYPE_BYTES[dtype] * tokens

    def weights_s(self, batch: int) -> float:
        """The part of a decode step that does not depend on the context."""
        reads_s, works_s = zip(*(self._product_s(name, batch) for name in self.num_params), strict=True)
        return max(sum(reads_s), sum(works_s))

    def decode_parts_s(self, batch: int, context: float) -> dict[str, float]:
        """A decode step by what is done in it: the matrix products by name, and attention."""
        products = {name: max(self._product_s(name, batch)) for name in self.num_params}
        return products | {"attention": batch * self.kv_bytes(context) / self.ceilings.bytes_per_s}

    def decode_step_s(self, batch: int, context: float) -> float:
        return self.weights_s(batch) + batch * self.kv_bytes(context) / self.ceilings.bytes_per_s

    def prefill_s(self, num_tokens: int) -> float:
        """One prompt to its first token."""
        return sum(self.prefill_parts_s(num_tokens).values())

    def prefill_parts_s(self, num_tokens: int) -> dict[str, float]:
        """A prompt by what is computed in it: the products of the layers, and attention. Not the logits of one token:
        these are bound by the read of the output head."""
        c = self.model
        products = {name: self._product_s(name, num_tokens)[1] for name in self.num_params if name != "logits"}
        # Key positions seen by all queries together: a triangle, cut off at the window.
        seen = 0.0
        for window in c.layer_windows:
            span = min(window or num_tokens, num_tokens)
            seen += span * span / 2 + (num_tokens - span) * span
        return products | {"attention": 4 * c.num_heads * c.head_dim * seen / self.ceilings.flops_per_s}

    def _product_s(self, name: str, batch: int) -> tuple[float, float]:
        """Reading a matrix of all layers, and multiplying a batch with it."""
        num, is_head = self.num_params[name], name == "logits"
        num_bytes = num * (DTYPE_BYTES[self.dtype] if is_head else weight_bytes(self.model, self.dtype, self.scheme))
        rate = self.ceilings.flops_per_s if is_head else self._linear_flops_per_s
        return num_bytes / self.ceilings.bytes_per_s, 2 * num * batch / rate

    @property
    def _linear_flops_per_s(self) -> float:
        is_fp8 = self.scheme is not None and self.scheme.kind == "float" and self.scheme.rounds_inputs
        return self.ceilings.fp8_flops_per_s if is_fp8 else self.ceilings.flops_per_s

    def run_s(self, lengths: list[tuple[int, int]], batch: int) -> float:
        """Requests of (input, output) tokens in their order, `batch` of them at a time, no prefix shared."""
        prefill_s = sum(self.prefill_s(num_input) for num_input, _ in lengths)
        kv_bytes = sum(num_output * self.kv_bytes(num_input + num_output / 2) for num_input, num_output in lengths)
        decode_s = kv_bytes / self.ceilings.bytes_per_s
        ends: list[int] = []  # a heap: the steps after which the running requests end
        step = 0
        outputs = [num_output for _, num_output in reversed(lengths)]
        while outputs or ends:
            while outputs and len(ends) < batch:
                heappush(ends, step + outputs.pop())
            decode_s += (ends[0] - step) * self.weights_s(len(ends))
            step = heappop(ends)
        return prefill_s + decode_s

    def summary(self, lengths: list[tuple[int, int]], batch: int) -> dict[str, Any]:
        """The floor of a run and of its mean step and prompt, with the ceilings it stands on."""
        num_input = sum(num for num, _ in lengths) / len(lengths)
        num_output = sum(num for _, num in lengths) / len(lengths)
        return {
            "device": self.ceilings.name,
            "read_tb_per_s": self.ceilings.bytes_per_s / 1e12,
            "tflop_per_s": self.ceilings.flops_per_s / 1e12,
            "run_s": self.run_s(lengths, batch),
            "decode_step_ms": self.decode_step_s(min(batch, len(lengths)), num_input + num_output / 2) * 1e3,
            "prefill_ms": self.prefill_s(round(num_input)) * 1e3,
        }
