"""Every op that a model calls on a CPU, with its start and end."""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.trace import Kernel
from engine import ops


@contextlib.contextmanager
def timed_ops(calls: list[Kernel]) -> Iterator[None]:
    """Until its end, append every call of an op to `calls`. The faces stand aside for ones with a clock."""

    def timed(name: str, face: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(face)
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.monotonic()
            result = face(*arguments, **keywords)
            calls.append(Kernel(name, start * 1e6, time.monotonic() * 1e6))
            return result

        return call

    faces = {name: face for name in ops.__all__ if inspect.isfunction(face := getattr(ops, name))}
    for name, face in faces.items():
        setattr(ops, name, timed(name, face))
    try:
        yield
    finally:
        for name, face in faces.items():
            setattr(ops, name, face)
