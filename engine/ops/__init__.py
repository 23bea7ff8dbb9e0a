"""The operations a model is made of. One face each: it checks, then calls the fastest body the device has.

Bodies: `reference` (plain torch: documentation, oracle, and the path that always works), CUDA (`kernels/*.cu`) and
native CPU code (`kernels/cpu/`).
"""

from engine.ops.attention import paged_attention
from engine.ops.dispatch import set_batch_invariant, warm_up
from engine.ops.gemm import gated_activation, gated_linear, linear, logits
from engine.ops.norm import add_rms_norm, rms_norm
from engine.ops.rotary import rotate_and_store
from engine.ops.sampling import gumbel_noise, logprobs, sample, take_best

__all__ = [
    "add_rms_norm",
    "gated_activation",
    "gated_linear",
    "gumbel_noise",
    "linear",
    "logits",
    "logprobs",
    "paged_attention",
    "rms_norm",
    "rotate_and_store",
    "sample",
    "set_batch_invariant",
    "take_best",
    "warm_up",
]
