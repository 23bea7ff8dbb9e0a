"""Compiled kernels on a GPU: load them, and launch them with little host time.

The driver is called directly: the arguments of a launch are packed into a buffer in one call, as the kernel's own
source declares them, and nothing is read from the device, so launches can be captured in a graph. One thread launches
(the worker's): a kernel's argument buffer is its own, not its caller's.
"""

import ctypes
import re
import struct
from functools import cache, lru_cache

import torch

from engine.errors import UserError
from engine.ops.compiler import INSTALL_HINT, Build, cubin, may_overlap, signatures, source

_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED_LIMIT = 48 << 10  # above it, a kernel must ask for shared memory
_MAP_UINT16, _MAP_SWIZZLE_NONE, _MAP_SWIZZLE_128B, _MAP_L2_PROMOTION_256B = 1, 0, 3, 3  # CU_TENSOR_MAP_*
_CLUSTER, _MAY_OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, ..._PROGRAMMATIC_STREAM_SERIALIZATION
_CONFIG = struct.Struct("@7IPPI4x")  # CUlaunchConfig: grid, threads, shared bytes, stream, attributes, their number
_ATTRIBUTE = struct.Struct("@I4x3I52x")  # CUlaunchAttribute: name, value


class Kernel:
    """One kernel on one GPU. Calling it launches it on torch's current stream.

    A kernel that waits for its inputs itself (`wait_for_inputs` in its source) may overlap the one launched before it:
    on GPUs that can (Hopper and newer), its blocks start as soon as that one makes room for them.
    """

    def __init__(
        self, name: str, function: int, signature: str, device: int, overlaps: bool, shared_bytes: int
    ) -> None:
        self.name = name
        self._shared_bytes = shared_bytes
        self._function, self._device = function, device
        letters = re.findall(r"\d*[a-zA-Z]", signature)
        self._arguments = struct.Struct("@" + signature)
        self._buffer = ctypes.create_string_buffer(self._arguments.size)
        # The driver gets the address of each argument: only the compiled kernel knows where it wants them.
        ends = [struct.calcsize("@" + "".join(letters[: i + 1])) for i in range(len(letters))]
        first = ctypes.addressof(self._buffer)
        places = [first + end - struct.calcsize(letter) for end, letter in zip(ends, letters, strict=True)]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self._overlaps = overlaps
        self._attributes = ctypes.create_string_buffer(2 * _ATTRIBUTE.size)  # of clusters, of overlap
        _ATTRIBUTE.pack_into(self._attributes, _ATTRIBUTE.size, _MAY_OVERLAP, 1, 0, 0)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: float | bytes, cluster: int = 1) -> None:
        """Pointers are passed as integers (`tensor.data_ptr()`), tensor maps as bytes.

        cluster: neighbours in x that run at the same time and reach each other's shared memory (Hopper and newer).
        """
        self._arguments.pack_into(self._buffer, 0, *arguments)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        has_cluster = cluster > 1
        if has_cluster:
            _ATTRIBUTE.pack_into(self._attributes, 0, _CLUSTER, cluster, 1, 1)
        attributes = ctypes.addressof(self._attributes) + (0 if has_cluster else _ATTRIBUTE.size)
        num_attributes = has_cluster + self._overlaps
        _CONFIG.pack_into(self._config, 0, *grid, threads, 1, 1, self._shared_bytes, stream, attributes, num_attributes)
        status = self._launch(self._config, self._function, self._places, None)
        if status:
            raise RuntimeError(f"launch of {self.name}, grid {grid}, {threads} threads: {_error(status)}")


@cache
def load(build: Build, device: int) -> dict[str, Kernel]:
    """The kernels of a build, by name, ready on a GPU."""
    code, driver = cubin(build), _driver()
    module, kernels = ctypes.c_void_p(), {}
    overlaps = torch.cuda.get_device_capability(device) >= (9, 0) and may_overlap(source(build.file))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the driver loads into torch's context: it must be there
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), build.file)
        for name, signature in signatures(source(build.file)).items():
            function = ctypes.c_void_p()
            _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
            assert function.value
            if build.shared_bytes > _STATIC_SHARED_LIMIT:
                _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, build.shared_bytes), name)
            kernels[name] = Kernel(name, function.value, signature, device, overlaps, build.shared_bytes)
    return kernels


@lru_cache(maxsize=4096)
def tensor_map(pointer: int, num_rows: int, row_length: int, box_rows: int) -> bytes:
    """For Hopper's copy engine: a matrix of 16-bit numbers, read in boxes of 64 columns, swizzled by 128 bytes."""
    return _encode_map(pointer, (row_length, num_rows), (row_length,), (64, box_rows))


@lru_cache(maxsize=4096)
def plain_map(pointer: int, num_rows: int, row_length: int, box_rows: int, box_columns: int) -> bytes:
    """The same, read in boxes of so many columns, up to 256, that come as they lie in memory, row after row."""
    shape, box = (row_length, num_rows), (box_columns, box_rows)
    return _encode_map(pointer, shape, (row_length,), box, _MAP_SWIZZLE_NONE)


@lru_cache(maxsize=4096)
def octets_map(pointer: int, num_rows: int, row_length: int, box_rows: int) -> bytes:
    """The same, read in boxes of whole rows: eight rows come panel by panel of 64 columns, before the next eight."""
    panels = row_length // 64
    shape, strides = (64, 8, panels, num_rows // 8), (row_length, 64, 8 * row_length)
    return _encode_map(pointer, shape, strides, (64, 8, panels, box_rows // 8))


def _encode_map(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = _MAP_SWIZZLE_128B,
) -> bytes:
    """Dimensions stand from the inner one out; strides are in numbers, from the second dimension on."""
    rank = len(shape)
    uints, longs = ctypes.c_uint32 * rank, ctypes.c_uint64 * rank
    place = ctypes.create_string_buffer(128 + 64)
    aligned = -(-ctypes.addressof(place) // 64) * 64
    status = _driver().cuTensorMapEncodeTiled(
        aligned,
        _MAP_UINT16,
        rank,
        pointer,
        longs(*shape),
        longs(*(2 * stride for stride in strides)),
        uints(*box),
        uints(*[1] * rank),
        0,
        swizzle,
        _MAP_L2_PROMOTION_256B,
        0,
    )
    _check(status, f"tensor map of {shape}")
    return ctypes.string_at(aligned, 128)


@cache
def _driver() -> ctypes.PyDLL:
    try:
        driver = ctypes.PyDLL("libcuda.so.1")  # PyDLL: no launch is worth giving up the interpreter's lock
    except OSError as error:
        raise UserError(f"the NVIDIA driver cannot be loaded ({error}); {INSTALL_HINT}") from error
    uint, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernelEx.argtypes = [pointer, pointer, pointer, pointer]
    driver.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    driver.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    driver.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    driver.cuTensorMapEncodeTiled.argtypes = [pointer, uint, uint, *[pointer] * 5, *[uint] * 4]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, pointer]
    return driver


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: {_error(status)}")


def _error(status: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    return f"CUDA error {status}, {(text.value or b'unknown').decode()}"
