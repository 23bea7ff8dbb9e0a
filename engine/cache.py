"""What is kept on disk from one run to the next, below ~/.cache/vcli: all of it can be made again."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of thing; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcli" / kind


def keep_bytecode() -> None:
    """Let this process and its children keep what Python compiles, where an installation came without it.

    In many container images nothing is compiled, and nothing is to be written beside the sources: then every import of
    torch compiles for seconds (1.4 s become 3.0 s).
    """
    torch = find_spec("torch")
    if torch is None or torch.cached is None or os.path.exists(torch.cached):
        return
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(cache_folder("bytecode"))
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
