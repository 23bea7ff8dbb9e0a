"""A coroutine run to its end, or until somebody wants this process to stop."""

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, or until SIGINT or SIGTERM: those end it in order, and go on as exceptions afterwards.

    Raised inside the loop, such an exception can be lost: a transport that is reading takes it for an error of its own.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    handlers = {s: handler for s, handler in handlers.items() if handler is not signal.SIG_IGN}
    stopped_by: list[int] = []

    async def main() -> Any:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def stop(signum: int) -> None:
            stopped_by.append(signum)
            task.cancel()

        for signum in handlers:
            loop.add_signal_handler(signum, stop, signum)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if not stopped_by:
                raise
        finally:
            for signum in handlers:
                loop.remove_signal_handler(signum)

    try:
        return _run(main())
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if stopped_by:  # whatever else went wrong because of it
            signal.raise_signal(stopped_by[0])


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """uvloop halves the client's own time for each token."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)
