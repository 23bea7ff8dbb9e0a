"""CUDA bodies of the ops: they pick tile and grid and launch the kernels of kernels/*.cu into new tensors.

Nothing here reads from the device, and grids depend on shapes and the batch's host numbers alone.
"""

from collections.abc import Iterable, Iterator

import torch

from engine.errors import UserError
from engine.ops import launcher
from engine.ops.compiler import Build, cubins
from engine.ops.cuda import attention, gemm, kernels, quantized, rows, sampling
from engine.ops.cuda.attention import paged_attention
from engine.ops.cuda.gemm import gated_linear, linear, logits
from engine.ops.cuda.quantized import (
    blockwise_linear,
    empty_grouped,
    grouped_gated_linear,
    grouped_linear,
    put_grouped,
    rounded_gated_linear,
    rounded_linear,
)
from engine.ops.cuda.rounding import add_rms_norm_rounded
from engine.ops.cuda.rows import add_rms_norm, gated_activation, rms_norm, rotate_and_store
from engine.ops.cuda.sampling import gumbel_noise, logprobs, mask_logits, sample, take_best
from engine.quantization.weight import Scheme

__all__ = [
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
    "model_builds",
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


def warm_up(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    masks: bool = True,
    kv_dtype: torch.dtype | None = None,
    schemes: Iterable[Scheme] = (),
) -> None:
    """Compile (or find in the cache) and load every kernel that a model needs: none is compiled while it serves.

    masks: some of its layers have a window or a soft cap. kv_dtype: of the KV cache, if not dtype. schemes: of its
    quantized weights.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    heads_per_kv = num_heads // num_kv_heads
    builds = list(  # once each: schemes share some
        dict.fromkeys(model_builds(kernels.arch(index), dtype, head_dim, heads_per_kv, masks, kv_dtype, schemes))
    )
    cubins(builds)
    for build in builds:
        launcher.load(build, index)


def model_builds(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    heads_per_kv: int,
    masks: bool = True,
    kv_dtype: torch.dtype | None = None,
    schemes: Iterable[Scheme] = (),
) -> Iterator[Build]:
    """The builds that a model of these numbers runs on."""
    if dtype not in kernels.MODEL_DTYPES:
        raise UserError(f"the CUDA kernels know bfloat16, float16 and float32, not {dtype}: choose one with --dtype")
    if head_dim % 8 or not 0 < head_dim <= 256:
        raise UserError(f"the CUDA kernels know head sizes of 8, 16, 24 to 256, not {head_dim}: use --device cpu")
    kv_dtype = kv_dtype or dtype
    yield from rows.builds(arch, dtype, head_dim, kv_dtype)
    yield from sampling.builds(arch)
    yield from attention.builds(arch, dtype, head_dim, heads_per_kv, masks, kv_dtype)
    yield from gemm.builds(arch, dtype)
    yield from quantized.builds(arch, dtype, schemes)


def set_batch_invariant(is_on: bool) -> None:
    """Whether, from now on, no result depends on what else is in the batch, to the last bit. Raises UserError."""
    arch = kernels.arch(torch.cuda.current_device())
    if is_on and arch != "sm_90a":
        raise UserError(f"--batch-invariant needs a Hopper GPU (H100, H200): its kernels are not built for {arch}")
    gemm.use_batch_invariant(is_on)
    attention.use_batch_invariant(is_on)
