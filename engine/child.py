"""How a module of this package is started as a process of its own.

The child must find the same `engine` package as its parent: installed, or beside the code that runs now, but never a
folder that happens to be called `engine` in the directory where the person stands.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: between fork and exec it could not be


def module_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]  # -P: the working directory is no place to import from


def module_environment() -> dict[str, str]:
    root = Path(__file__).resolve().parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    search_path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}


def die_with_parent(signal_number: int = signal.SIGTERM) -> None:
    """Ask the kernel to end this process when its parent ends, however that happens; also as Popen's preexec_fn."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal_number)
