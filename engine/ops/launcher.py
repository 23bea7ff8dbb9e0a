"""Compiled kernels on a GPU: load them, and launch them with little host time.

The driver is called directly: the arguments of a launch are packed into a buffer in one call, as the kernel's own
source declares them, and nothing is read from the device, so launches can be captured in a graph. One thread launches
(the worker's): a kernel's argument buffer is its own, not its caller's.
"""

import ctypes
import struct
from functools import cache

import torch

from engine.errors import UserError
from engine.ops.compiler import INSTALL_HINT, Build, cubin, signatures, source

_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED_LIMIT = 48 << 10  # above it, a kernel must ask for shared memory
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*


class Kernel:
    """One kernel on one GPU. Calling it launches it on torch's current stream."""

    def __init__(self, name: str, function: int, signature: str, device: int) -> None:
        self.name = name
        self._function, self._device = function, device
        self._arguments = struct.Struct("@" + signature)  # native alignment is that of CUDA's parameters
        self._buffer = ctypes.create_string_buffer(self._arguments.size)
        self._size = ctypes.c_size_t(self._arguments.size)
        self._extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(self._buffer), _BUFFER_SIZE, ctypes.addressof(self._size), _END
        )
        self._launch = _driver().cuLaunchKernel

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: float, shared_bytes: int = 0) -> None:
        """Pointers are passed as integers (`tensor.data_ptr()`)."""
        self._arguments.pack_into(self._buffer, 0, *arguments)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        status = self._launch(self._function, *grid, threads, 1, 1, shared_bytes, stream, None, self._extra)
        if status:
            raise RuntimeError(f"launch of {self.name}, grid {grid}, {threads} threads: {_error(status)}")

    def allow_shared_bytes(self, shared_bytes: int) -> None:
        """Say once how much dynamic shared memory launches will ask for."""
        if shared_bytes > _STATIC_SHARED_LIMIT:
            _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_SIZE, shared_bytes), self.name)


@cache
def load(build: Build, device: int) -> dict[str, Kernel]:
    """The kernels of a build, by name, ready on a GPU."""
    code, driver = cubin(build), _driver()
    module, kernels = ctypes.c_void_p(), {}
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the driver loads into torch's context: it must be there
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), build.file)
        for name, signature in signatures(source(build.file)).items():
            function = ctypes.c_void_p()
            _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
            assert function.value
            kernels[name] = Kernel(name, function.value, signature, device)
    return kernels


@cache
def _driver() -> ctypes.PyDLL:
    try:
        driver = ctypes.PyDLL("libcuda.so.1")  # PyDLL: no launch is worth giving up the interpreter's lock
    except OSError as error:
        raise UserError(f"the NVIDIA driver cannot be loaded ({error}); {INSTALL_HINT}") from error
    uint, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *[uint] * 7, pointer, pointer, pointer]
    driver.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    driver.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    driver.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, pointer]
    return driver


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: {_error(status)}")


def _error(status: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    return f"CUDA error {status}, {(text.value or b'unknown').decode()}"
