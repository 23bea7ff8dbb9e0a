"""Engines one after the other in one process: each wants the memory that the one before had."""

import gc
import sys


def free_memory() -> None:
    """Give back what an engine has left whose last reference is gone: to the next one, or to other processes."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()  # does nothing where no GPU is in use
