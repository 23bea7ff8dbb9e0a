"""The operations a model is made of. One face each: it checks, then calls the fastest body the device has.

Bodies: `reference` (plain torch: documentation, oracle, and the path that always works), CUDA (`kernels/*.cu`) and
native CPU code (`kernels/cpu/`).
"""

from engine.ops.activations import Activations, RoundedRows
from engine.ops.attention import paged_attention
from engine.ops.dispatch import set_batch_invariant, warm_up
from engine.ops.gemm import gated_activation, gated_linear, linear, logits
from engine.ops.grouped import ROWS_TOGETHER, GroupedWeight
from engine.ops.norm import add_rms_norm, add_rms_norm_rounded, rms_norm
from engine.ops.quantized import (
    blockwise_linear,
    empty_grouped,
    grouped_gated_linear,
    grouped_linear,
    put_grouped,
    rounded_gated_linear,
    rounded_linear,
)
from engine.ops.rotary import rotate_and_store
from engine.ops.sampling import gumbel_noise, logprobs, mask_logits, sample, take_best

__all__ = [
    "ROWS_TOGETHER",
    "Activations",
    "GroupedWeight",
    "RoundedRows",
    "add_rms_norm",
    "add_rms_norm_rounded",
    "blockwise_linear",
    "empty_grouped",
    "gated_activation",
    "gated_linear",
    "grouped_gated_linear",
    "grouped_linear",
    "gumbel_noise",
    "linear",
    "logits",
    "logprobs",
    "mask_logits",
    "paged_attention",
    "put_grouped",
    "rms_norm",
    "rotate_and_store",
    "rounded_gated_linear",
    "rounded_linear",
    "sample",
    "set_batch_invariant",
    "take_best",
    "warm_up",
]
