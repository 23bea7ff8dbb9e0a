"""CUDA sources to machine code, by NVRTC: no CUDA toolkit and no header is needed on the user's machine.

A `Build` says what to compile, and the code depends on nothing else: so it is kept on disk under a hash of the
source, the headers, the options and the compiler's version, and a second start of the engine compiles nothing. Needs no
GPU.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.cache import cache_folder
from engine.errors import UserError
from engine.ops.sources import kernels_folder

INSTALL_HINT = "`pip install vcli[cuda]` brings what the CUDA kernels need"


@dataclass(frozen=True)
class Build:
    """One kernel file, compiled for one GPU generation with one set of constants."""

    file: str  # below kernels/
    arch: str  # sm_90a
    defines: tuple[str, ...] = ()  # NAME=value
    shared_bytes: int = 0  # of dynamic shared memory, that its launches get

    @property
    def options(self) -> list[str]:
        return [
            f"--gpu-architecture={self.arch}",
            "--std=c++17",
            *(f"--define-macro={define}" for define in self.defines),
        ]


def cubin(build: Build) -> bytes:
    """The machine code of a build, from the disk cache or the compiler."""
    nvrtc = _nvrtc()
    key = hashlib.sha256()
    for text in (str(nvrtc.nvrtcVersion()), *build.options, source(build.file), *_headers().values()):
        key.update(text.encode() + b"\0")
    path = cache_folder("kernels") / f"{Path(build.file).stem}-{build.arch}-{key.hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    code, _ = compile_source(build)
    _write_atomically(path, code)
    return code


def cubins(builds: Iterable[Build]) -> list[bytes]:
    """Many builds at once: the compiler runs in threads of its own."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(cubin, builds))


def compile_source(build: Build, extra_options: Iterable[str] = ()) -> tuple[bytes, str]:
    """(machine code, compiler's log) of a build, past the cache. RuntimeError with the log if the source is wrong."""
    nvrtc, headers = _nvrtc(), _headers()
    _, program = nvrtc.nvrtcCreateProgram(
        source(build.file).encode(),
        build.file.encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    try:
        options = [option.encode() for option in (*build.options, *extra_options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _output(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if "invalid value for --gpu-architecture" in log:
            raise UserError(f"the CUDA compiler (NVRTC) is too old for this GPU ({build.arch}): {INSTALL_HINT}")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{build.file} {' '.join(build.options)}: {status.name}\n{log.strip(chr(0))}")
        return _output(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def arch_of(capability: tuple[int, int]) -> str:
    """sm_90a for (9, 0): from Hopper on, the target that has the instructions of just this generation."""
    major, minor = capability
    if major < 8:
        raise UserError(f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer")
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def signatures(text: str) -> dict[str, str]:
    """Name → types of the parameters, of every kernel in a source: as letters of Python's struct module.

    >>> signatures('extern "C" __global__ void f(float* x, int n, float eps) {')
    {'f': 'Pif'}
    """
    kernels = re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([\w, ]+\)\s+)?(\w+)\(([^)]*)\)', text)
    letters = {"int": "i", "i64": "q", "float": "f", "TensorMap": "128s"}
    return {
        name: "".join(
            "P" if "*" in parameter else letters[parameter.split()[-2]] for parameter in parameters.split(",")
        )
        for name, parameters in kernels
    }


def may_overlap(text: str) -> bool:
    """Whether a source's kernels, or what it includes, wait for their inputs by themselves: all of them do, or none."""
    included = (_headers()[name] for name in re.findall(r'#include "([\w.]+)"', text))
    return "wait_for_inputs();" in text or any(may_overlap(header) for header in included)


@cache
def source(file: str) -> str:
    return (kernels_folder() / file).read_text()


@cache
def _headers() -> dict[str, str]:
    """All headers, by the name under which sources include them: the compiler gets them by hand, not by path."""
    return {path.name: path.read_text() for path in sorted(kernels_folder().rglob("*.cuh"))}


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the bindings are there, the library is not
        raise UserError(f"the CUDA compiler cannot be loaded ({error}): {INSTALL_HINT}") from error
    return nvrtc


def _output(program: Any, get_size: Any, get: Any) -> bytes:
    _, size = get_size(program)
    output = b"\0" * size
    get(program, output)  # fills the bytes in place
    return output


def _write_atomically(path: Path, content: bytes) -> None:
    """Other engines may write or read the same file now. A cache that cannot be written is no cache, and no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
