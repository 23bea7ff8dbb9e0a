"""What the CUDA bodies share: builds by their constants, kernels ready to launch, checks of their tensors."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from engine.ops import launcher
from engine.ops.compiler import Build, arch_of

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALARS = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "float",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "s8",
}


def kernel(x: Tensor, name: str, make_build: Callable[..., Build], *constants: object) -> launcher.Kernel:
    """A kernel for x's device, of the build that `make_build(arch, *constants)` describes."""
    device = x.get_device()
    return loaded(device, arch(device), name, make_build, *constants)


@cache
def loaded(device: int, arch: str, name: str, make_build: Callable[..., Build], *constants: object) -> launcher.Kernel:
    return launcher.load(make_build(arch, *constants), device)[name]


def define_build(arch: str, file: str, shared_bytes: int = 0, **constants: int | torch.dtype) -> Build:
    """A build with constants as its macros: `head_dim=128` is HEAD_DIM, a torch dtype is the kernels' name of it.

    shared_bytes: of dynamic shared memory, that its launches get.
    """
    defines = []
    for name, value in constants.items():
        defines.append(f"{name.upper()}={SCALARS[value] if isinstance(value, torch.dtype) else value}")
    return Build(file, arch, tuple(defines), shared_bytes)


@cache
def arch(device: int) -> str:
    return arch_of(torch.cuda.get_device_capability(device))


@cache
def num_sms(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def check_rows(*tensors: Tensor) -> None:
    """Kernels read and write 16 bytes at a time, in tensors of one type without gaps."""
    for tensor in tensors:
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.dtype is tensors[0].dtype, (tensor.dtype, tensors[0].dtype)
        assert tensor.shape[-1] * tensor.itemsize % 16 == 0, tensor.shape


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
