"""The machine and the software behind a figure, so that somebody else can believe it or repeat it.

Imports no torch: the load client must stay light, and the facts are in files and in `nvidia-smi`.
"""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")  # nvidia-smi's names
KEY_FLAG = "--api-key"
PACKAGES = ("torch", "transformers", "numpy", "aiohttp")


def environment() -> dict[str, Any]:
    """GPU and CPU, versions, git revision, date and the command that was run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        **gpus(),
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),  # beside cpu_count it tells a busy machine
        "platform": platform.platform(),
        "python": platform.python_version(),
        "vcli": _version("vcli") or _checkout_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": _torch_cuda_version(),
        **git_revision(),
    }


def command_line() -> str:
    """The command as it can be typed again, but for a key: results are shown around."""
    program = Path(sys.argv[0])
    module = {"__main__.py": f"python -m {program.parent.name}"}.get(program.name)
    if module is None and program.suffix == ".py":
        module = f"python -m {program.parent.name}.{program.stem}"
    arguments = [re.sub(f"^({KEY_FLAG})=.*", r"\1=HIDDEN", each, flags=re.DOTALL) for each in sys.argv[1:]]
    shown = [
        "HIDDEN" if before == KEY_FLAG else each for before, each in zip(["", *arguments], arguments, strict=False)
    ]
    return " ".join([module or program.name, *map(shlex.quote, shown)])


def gpus() -> dict[str, Any]:
    """{"gpu": name, "num_gpus": n, "driver": version, "gpu_clocks": {...}}; gpu is None where there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(['name', 'driver_version', *CLOCKS])}", "--format=csv,noheader"]
    lines = [line.split(", ") for line in _output(query).splitlines() if ", " in line]
    if not lines:
        return {"gpu": None, "num_gpus": 0, "driver": None, "gpu_clocks": None}
    name, driver, *clocks = lines[0]
    return {"gpu": name, "num_gpus": len(lines), "driver": driver, "gpu_clocks": dict(zip(CLOCKS, clocks, strict=True))}


def gpu_memory_used() -> int | None:
    """Bytes in use on all GPUs; None without one."""
    lines = _output(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]).split()
    return sum(map(int, lines)) << 20 if lines else None


def cpu_name() -> str:
    try:
        models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def git_revision() -> dict[str, Any]:
    """The checkout's commit and whether files differ from it.

    Outside a checkout, VCLI_GIT_REVISION says what was built (in a container, say), and None that nobody knows.
    """
    revision = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    if not revision:
        return {"git_revision": os.environ.get("VCLI_GIT_REVISION"), "git_dirty": None}
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return {"git_revision": revision, "git_dirty": bool(changes.strip())}


def short_revision(environment: dict[str, Any]) -> str:
    """Of a result's environment: the commit, with a + where files differed from it; - where nobody knows."""
    return (environment.get("git_revision") or "-")[:9] + ("+" if environment.get("git_dirty") else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout_version() -> str | None:
    file = ROOT / "pyproject.toml"
    return str(tomllib.loads(file.read_text())["project"]["version"]) if file.is_file() else None


def _torch_cuda_version() -> str | None:
    """The CUDA version torch was built for, read from its version file."""
    spec = importlib.util.find_spec("torch")
    for folder in spec.submodule_search_locations or [] if spec else []:
        file = Path(folder) / "version.py"
        found = re.search(r"^cuda[^=]*= '([\d.]+)'", file.read_text(), re.MULTILINE) if file.is_file() else None
        return found[1] if found else None
    return None


def _output(command: list[str]) -> str:
    """What a command prints; nothing when it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
