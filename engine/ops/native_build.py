"""Turns kernels/cpu into a library with the compiler of the machine, once: the next process finds it on disk.

The library's name is a hash of everything it was made from (sources, flags, compiler, processor), so a stale one is
never loaded.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.cache import cache_folder
from engine.ops.sources import kernels_folder

FLAGS = [
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fPIC",
    "-fopenmp-simd",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def load_library() -> ctypes.CDLL | None:
    """The library, compiled now or before; None if the machine cannot make one (a line on stderr says why)."""
    if os.environ.get("VCLI_NATIVE") == "0":
        return None
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    try:
        if not compiler:
            raise OSError("no C compiler found")
        library = cache_folder("kernels") / f"cpu-{_key(compiler)}.so"
        if not library.exists():
            _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        reason = f"{compiler}: {(error.stderr or 'failed').strip().splitlines()[0]}"
    except OSError as error:
        reason = str(error)
    print(f"vcli: native CPU kernels are off, torch runs instead (slower): {reason}", file=sys.stderr)
    return None


def _sources() -> list[Path]:
    return sorted((kernels_folder() / "cpu").glob("*.c"))


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    parts = [version, " ".join(FLAGS).encode(), _processor().encode()]
    parts += [path.read_bytes() for path in [*_sources(), *sorted((kernels_folder() / "cpu").glob("*.h"))]]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at: the name and abilities of the first processor."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.exists() else ""
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *(line for line in first.splitlines() if line.startswith(wanted))])


def _compile(compiler: str, library: Path) -> None:
    """All sources at the same time, then the link; the library appears whole or not at all."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder, f"{source.stem}.o") for source in _sources()]
        commands = [
            [compiler, *FLAGS, "-c", str(source), "-o", str(object_)]
            for source, object_ in zip(_sources(), objects, strict=True)
        ]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        for process in running:
            stderr = process.communicate()[1]
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=stderr)
        built = Path(folder, library.name)
        link = [compiler, "-shared", "-pthread", *map(str, objects), "-lm", "-o", str(built)]
        subprocess.run(link, check=True, capture_output=True, text=True)
        built.replace(library)
