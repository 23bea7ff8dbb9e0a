"""Which body of an op runs: `cuda` for tensors on a GPU, `native` for those it knows on a CPU, `reference` otherwise.

Each of the three modules holds functions of the same names and signatures.
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model_config import ModelConfig
from engine.ops import native, reference
from engine.quantization.weight import Scheme


def body(x: Tensor) -> ModuleType:
    """The module whose functions take tensors like x."""
    if x.is_cuda:
        from engine.ops import cuda

        return cuda
    return native if native.is_usable(x) else reference


def warm_up(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, config: ModelConfig, schemes: Iterable[Scheme]
) -> None:
    """Build every kernel that a model needs, weights of `schemes` included: none is compiled while it serves."""
    if device.type == "cuda":
        from engine.ops import cuda

        masks = any(config.layer_windows) or bool(config.attention_softcap)
        heads = (config.head_dim, config.num_heads, config.num_kv_heads)
        cuda.warm_up(device, dtype, *heads, masks, kv_dtype, schemes)
    else:
        native.is_usable(torch.empty(0, dtype=dtype))


def set_batch_invariant(device: torch.device, is_on: bool) -> None:
    """Whether, from now on in this process, no result depends on what else is in the batch, to the last bit."""
    if device.type == "cuda":
        from engine.ops import cuda

        cuda.set_batch_invariant(is_on)
    elif is_on:
        raise UserError("--batch-invariant needs a Hopper GPU (H100, H200): the CPU's products depend on the batch")
