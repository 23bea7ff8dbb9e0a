"""The CUDA kernels on the CPU: their sources, compiled by g++ with emulated_ptx.cuh in the place of common/ptx.cuh."""

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

from engine.ops.compiler import Build, may_overlap, signatures, source
from engine.ops.sources import kernels_folder

C_TYPES = {
    "P": ctypes.c_void_p,
    "i": ctypes.c_int,
    "q": ctypes.c_longlong,
    "f": ctypes.c_float,
    "128s": ctypes.c_char_p,
}
HEADERS = ("ptx.cuh", "ptx_sm90.cuh")  # each has an emulated_ twin beside this file


class EmulatedKernel:
    """What engine.ops.launcher.Kernel is on a GPU."""

    def __init__(self, library: ctypes.CDLL, name: str, signature: str, shared_bytes: int) -> None:
        self._shared_bytes = shared_bytes
        self._run = library[f"run_{name}"]
        arguments = [C_TYPES[letter] for letter in _letters(signature)]
        self._run.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, *arguments]

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: float, cluster: int = 1) -> None:
        self._run((ctypes.c_int * 3)(*grid), threads, self._shared_bytes, cluster, *arguments)


def load(build: Build, folder: Path) -> dict[str, EmulatedKernel]:
    """The kernels of a build, compiled in a folder of their own."""
    for header in kernels_folder().rglob("*.cuh"):
        (folder / header.name).write_text(_with_shared_memory(header.read_text()))
    for header in HEADERS:
        shutil.copy(Path(__file__).parent / f"emulated_{header}", folder / header)
    text = _with_shared_memory(source(build.file))
    kernels = signatures(text)
    (folder / "kernels.cpp").write_text(
        '#include "ptx.cuh"\n' + text + "".join(map(_runner, kernels, kernels.values()))
    )
    # Every library keeps its variables to itself: shared memory of one name has another size in another build.
    alone = ["-fno-gnu-unique", "-Wl,-Bsymbolic"]
    if may_overlap(source(build.file)):
        alone.append("-DMAY_OVERLAP")
    if "wait_for_arrivals(" in source(build.file):
        alone.append("-DBLOCKS_WAIT")
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-Wno-psabi", *alone]
    options += [f"-D{define}" for define in (f"__CUDA_ARCH__={build.arch.strip('sm_a')}0", *build.defines)]
    subprocess.run(["g++", *options, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    is_large = build.arch == "sm_90a" or build.file.startswith("gemm/")  # whose build is for more than sm_80 has
    assert build.shared_bytes <= (227 if is_large else 163) << 10
    return {name: EmulatedKernel(library, name, signature, build.shared_bytes) for name, signature in kernels.items()}


def tensor_map(pointer: int, num_rows: int, row_length: int, box_rows: int, box_columns: int = 0) -> bytes:
    """What engine.ops.launcher.tensor_map, plain_map and octets_map are on a GPU."""
    return struct.pack("5Q88x", pointer, num_rows, row_length, box_rows, box_columns)


def _with_shared_memory(text: str) -> str:
    return re.sub(r"extern __shared__ uint4 (\w+)\[\];", r"uint4* \1 = dynamic_shared.data();", text)


def _letters(signature: str) -> list[str]:
    return re.findall(r"\d*[a-zA-Z]", signature)


def _runner(name: str, signature: str) -> str:
    types = {"P": "void*", "i": "int", "q": "i64", "f": "float", "128s": "const void*"}
    as_argument = {"P": "Any{{p{0}}}", "128s": "copied<TensorMap>(p{0})"}
    letters = _letters(signature)
    parameters = "".join(f", {types[letter]} p{i}" for i, letter in enumerate(letters))
    arguments = ", ".join(as_argument.get(letter, "p{0}").format(i) for i, letter in enumerate(letters))
    return f"""
#ifndef ANY
#define ANY
struct Any {{ void* p; template <class T> operator T*() const {{ return static_cast<T*>(p); }} }};
template <class T> T copied(const void* p) {{ T x; std::memcpy(&x, p, sizeof(T)); return x; }}
#endif
extern "C" void run_{name}(const int* grid, int threads, int shared_bytes, int cluster{parameters}) {{
  run_grid(grid, threads, shared_bytes, cluster, [=] {{ {name}({arguments}); }});
}}
"""
