"""A `vcli serve` of our own: started on a free port, waited for, and stopped whatever happens.

Invariant: when the `with` block ends, by its end, an error, Ctrl-C or SIGTERM, no process of the server is left.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from engine.child import die_with_parent, module_command, module_environment
from engine.errors import UserError

READY_POLL_S = 0.02
STOP_TIMEOUT_S = 20.0
LOG_LINES = 15
OnProgress = Callable[[str, float], None]  # stage, share done


@contextlib.contextmanager
def running_server(
    arguments: list[str],
    on_progress: OnProgress = lambda stage, fraction: None,
    environment: dict[str, str] | None = None,
    log_path: Path | None = None,
) -> Iterator[str]:
    """Start `vcli serve` with these arguments and give its URL once the model is loaded.

    `environment` is put over this process's own. What the server prints goes to log_path, if somebody is to read it.
    Raises UserError with the end of its log when it does not come up, or has died by the end of the block.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [*arguments, "--host", "127.0.0.1", "--port", str(port), "--drain-timeout", "1s"]
    with _open_log(log_path) as log, _sigterm_as_exit():
        # Its own session: Ctrl-C reaches us alone, and we stop the server in order.
        process = subprocess.Popen(
            module_command("vcli", "serve", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**module_environment(), **(environment or {})},
            start_new_session=True,
            preexec_fn=die_with_parent,  # the last resort, should this process end without coming to its `finally`
        )
        try:
            while not _is_ready(url, on_progress):
                _check_alive(process, log)
                time.sleep(READY_POLL_S)
            yield url
            _check_alive(process, log)
        finally:
            _stop(process)


def _open_log(path: Path | None) -> IO[str]:
    if path is None:
        return tempfile.TemporaryFile("w+", prefix="vcli-serve-", errors="replace")
    return path.open("w+", errors="replace")


def _is_ready(url: str, on_progress: OnProgress) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=10):
            return True
    except urllib.error.HTTPError as error:
        with error:
            on_progress(*_stage(error.read()))
    except (OSError, ValueError):
        pass  # it does not listen yet
    return False


def _stage(body: bytes) -> tuple[str, float]:
    try:
        status: dict[str, Any] = json.loads(body)
        return str(status["stage"]), float(status["percent"]) / 100
    except (ValueError, LookupError, TypeError):
        return "the server", 0.0


def _check_alive(process: subprocess.Popen[bytes], log: IO[str]) -> None:
    if process.poll() is None:
        return
    log.seek(0)
    lines = log.read().strip().splitlines()[-LOG_LINES:]
    if process.returncode == 1 and lines and lines[-1].startswith("vcli: "):
        raise UserError(lines[-1].removeprefix("vcli: "))  # its message to the person is ours
    raise UserError("\n".join([f"the server ended with exit code {process.returncode}; its last words:", *lines]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for one that does not go."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """While it lasts, SIGTERM unwinds this process as an exit does, so that `finally` is reached."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
