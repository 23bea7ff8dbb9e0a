"""The memory behind the block ids: the keys and the values of each layer, and how many blocks fit."""

import math

import numpy as np
import psutil
import torch
from torch import Tensor

from engine.config import BLOCK_SIZE, EngineConfig
from engine.errors import UserError
from engine.layers.attention import Attention

MAX_CPU_CACHE_BYTES = 4 << 30  # on a CPU the cache shares the memory with everything else that runs there


def bytes_per_block(attentions: list[Attention], dtype: torch.dtype) -> int:
    """Keys and values of BLOCK_SIZE tokens in all layers."""
    return sum(2 * BLOCK_SIZE * a.num_kv_heads * a.head_dim * dtype.itemsize for a in attentions)


def allocate(attentions: list[Attention], num_blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give every attention layer its caches, [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim] each; all of them
    together, keys and values of a layer one after the other.

    Zeroed, so that a kernel may read past a request's end and multiply what it finds by zero.
    """
    (block_shape,) = {(attention.num_kv_heads, BLOCK_SIZE, attention.head_dim) for attention in attentions}
    cache = _zeros((2 * len(attentions), num_blocks, *block_shape), dtype, device)
    for attention, k_cache, v_cache in zip(attentions, cache[::2], cache[1::2], strict=True):
        attention.k_cache, attention.v_cache = k_cache, v_cache
    return cache


def release(attentions: list[Attention]) -> None:
    """Take the caches away again, and give their memory back to the device."""
    for attention in attentions:
        attention.k_cache = attention.v_cache = torch.empty(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def num_blocks_that_fit(config: EngineConfig, block_bytes: int, device: torch.device, largest_batch_bytes: int) -> int:
    """How many blocks the memory holds beside the weights and what the largest batch was seen to take."""
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = free - largest_batch_bytes - int(total * (1 - config.gpu_memory_utilization))
    else:
        budget = min(psutil.virtual_memory().available // 2, MAX_CPU_CACHE_BYTES)
    num_blocks = budget // block_bytes
    if num_blocks < 1:
        raise UserError(
            f"no memory is left for the KV cache: it may take {budget:,} bytes, one block of {BLOCK_SIZE} tokens takes "
            f"{block_bytes:,}: use a smaller model, or raise --gpu-memory-utilization or --kv-cache-memory"
        )
    return num_blocks


def fit_max_model_len(config: EngineConfig, native_max_model_len: int, num_blocks: int, block_bytes: int) -> int:
    """The longest sequence to serve: what was asked for, or the model's own length where the cache holds that much."""
    num_slots = num_blocks * BLOCK_SIZE
    if config.max_model_len is None:
        return min(native_max_model_len, num_slots)
    if config.max_model_len > num_slots:
        needed, size = -(-config.max_model_len // BLOCK_SIZE) * block_bytes, num_blocks * block_bytes
        raise UserError(
            f"--max-model-len {config.max_model_len:,} needs a KV cache of {needed:,} bytes, "
            f"{size:,} are there ({num_slots:,} tokens): lower it or give the cache more memory"
        )
    return config.max_model_len


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch would write the zeros; numpy asks for zeroed memory, which takes none until it is used.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
