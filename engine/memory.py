"""What the device's memory holds, by kind.

On a GPU the kinds add up to all of its memory. On a CPU, which shares its memory with everything else that runs there,
they are what the engine has set apart, and what its process has in memory (a KV cache takes none until it is used).
"""

import psutil
import torch
from torch import Tensor


def device_memory(device: torch.device, kept: dict[str, int]) -> dict[str, int]:
    """Bytes by kind: what is `kept` (weights, kv_cache, cuda_graphs), and what is there beside it.

    On a GPU "other" (activations, torch's pool, the context, other processes) and "free"; on a CPU "resident".
    """
    if device.type == "cpu":
        return kept | {"resident": psutil.Process().memory_info().rss}
    free, total = torch.cuda.mem_get_info(device)
    return kept | {"other": max(total - free - sum(kept.values()), 0), "free": free}


def fragmentation(device: torch.device) -> float | None:
    """Of a GPU's memory that torch holds, the share that lies unused between tensors, 0 to 1; None on a CPU."""
    if device.type == "cpu":
        return None
    stats = torch.cuda.memory_stats(device)
    reserved = stats["reserved_bytes.all.current"]
    return stats["inactive_split_bytes.all.current"] / reserved if reserved else 0.0


def weight_bytes(model: object) -> int:
    """What the weights take in memory: every tensor that hangs on the model, but caches and tables of positions."""
    seen: set[int] = set()
    others = ("k_cache", "v_cache", "cos_sin", "placement")

    def count(value: object) -> int:
        if id(value) in seen or isinstance(value, type):
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.nbytes
        if isinstance(value, list | tuple):
            return sum(map(count, value))
        if isinstance(value, dict):
            return sum(count(held) for name, held in value.items() if name not in others)
        return count(vars(value)) if hasattr(value, "__dict__") else 0

    return count(model)
