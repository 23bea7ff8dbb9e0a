"""Native CPU bodies of the ops, built from kernels/cpu at first use."""

from torch import Tensor


def is_usable(x: Tensor) -> bool:
    return False
