"""How a module of this package is started as a process of its own.

The child must find the same `engine` package as its parent: installed, or beside the code that runs now, but never a
folder that happens to be called `engine` in the directory where the person stands.
"""

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]  # -P: the working directory is no place to import from


def module_environment() -> dict[str, str]:
    root = Path(__file__).resolve().parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    search_path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
