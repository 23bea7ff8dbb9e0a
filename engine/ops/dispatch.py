"""Which body of an op runs: `cuda` for tensors on a GPU, `native` for those it knows on a CPU, `reference` otherwise.

Each of the three modules holds functions of the same names and signatures.
"""

from types import ModuleType

from torch import Tensor

from engine.ops import native, reference


def body(x: Tensor) -> ModuleType:
    """The module whose functions take tensors like x."""
    if x.is_cuda:
        from engine.ops import cuda

        return cuda
    return native if native.is_usable(x) else reference
