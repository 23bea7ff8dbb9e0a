"""The CUDA kernels on the CPU: their sources, compiled by g++ with emulated_ptx.cuh in the place of common/ptx.cuh."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from engine.ops.compiler import Build, signatures, source
from engine.ops.sources import kernels_folder

C_TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}


class EmulatedKernel:
    """What engine.ops.launcher.Kernel is on a GPU."""

    def __init__(self, library: ctypes.CDLL, name: str, signature: str) -> None:
        self._run = library[f"run_{name}"]
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *(C_TYPES[letter] for letter in signature)]

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: float, shared_bytes: int = 0) -> None:
        assert shared_bytes <= 99 << 10, "the smallest GPUs have 99 KiB of shared memory"
        self._run((ctypes.c_int * 3)(*grid), threads, shared_bytes, *arguments)


def load(build: Build, folder: Path) -> dict[str, EmulatedKernel]:
    """The kernels of a build, compiled in a folder of their own."""
    for header in kernels_folder().rglob("*.cuh"):
        shutil.copy(header, folder)
    shutil.copy(Path(__file__).parent / "emulated_ptx.cuh", folder / "ptx.cuh")
    text = re.sub(r"extern __shared__ uint4 (\w+)\[\];", r"uint4* \1 = dynamic_shared.data();", source(build.file))
    kernels = signatures(text)
    (folder / "kernels.cpp").write_text(
        '#include "ptx.cuh"\n' + text + "".join(map(_runner, kernels, kernels.values()))
    )
    # Every library keeps its variables to itself: shared memory of one name has another size in another build.
    alone = ["-fno-gnu-unique", "-Wl,-Bsymbolic"]
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-w", *alone, *(f"-D{define}" for define in build.defines)]
    subprocess.run(["g++", *options, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    return {name: EmulatedKernel(library, name, signature) for name, signature in kernels.items()}


def _runner(name: str, signature: str) -> str:
    types = {"P": "void*", "i": "int", "q": "i64", "f": "float"}
    parameters = "".join(f", {types[letter]} p{i}" for i, letter in enumerate(signature))
    arguments = ", ".join(f"Any{{p{i}}}" if letter == "P" else f"p{i}" for i, letter in enumerate(signature))
    return f"""
#ifndef ANY
#define ANY
struct Any {{ void* p; template <class T> operator T*() const {{ return static_cast<T*>(p); }} }};
#endif
extern "C" void run_{name}(const int* grid, int threads, int shared_bytes{parameters}) {{
  run_grid(grid, threads, shared_bytes, [=] {{ {name}({arguments}); }});
}}
"""
