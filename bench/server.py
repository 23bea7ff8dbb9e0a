"""A `vcli serve` of our own: started on a free port, waited for, and stopped whatever happens.

Invariant: when the `with` block ends, by its end, an error, Ctrl-C or SIGTERM, no process of the server is left.
"""

import contextlib
import json
import os
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

import psutil

from engine.child import die_with_parent, module_command, module_environment
from engine.errors import UserError

HOST = "http://127.0.0.1"
API, ENGINE = "vcli: api", "vcli: engine 0"  # titles of a server's processes; an engine that stands by has another
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
    port = free_port()
    url = f"{HOST}:{port}"
    command = module_command("vcli", "serve", *arguments, *own_address(port))
    environment = {**module_environment(), **(environment or {})}
    with running_process(command, environment, lambda: _is_ready(url, on_progress), log_path):
        yield url


def titled(title: str, parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The children of a process, or of this one, that call themselves so: `API`, or the API process's `ENGINE`."""
    found = []
    for child in (parent or psutil.Process()).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if child.cmdline()[:1] == [title]:
                found.append(child)
    return found


def own_address(port: int) -> list[str]:
    """What a server that we start is told beside its model and settings.

    It wants no key, also where VCLI_API_KEY holds one: that is for a server that somebody else started.
    """
    return ["--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "1s", "--api-key", ""]


@contextlib.contextmanager
def running_process(
    command: list[str], environment: dict[str, str], is_ready: Callable[[], bool], log_path: Path | None = None
) -> Iterator[None]:
    """Any server: started, waited for until it is ready, and stopped with all its children.

    Raises UserError when it cannot be started, with the end of its log when it does not come up or dies.
    """
    with _open_log(log_path) as log, _sigterm_as_exit():
        try:
            # Its own session: Ctrl-C reaches us alone, and we stop the server in order.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,  # the last resort, should this process end without its `finally`
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started ({error.strerror})") from None
        try:
            while not is_ready():
                _check_alive(process, log)
                time.sleep(READY_POLL_S)
            yield
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


def answers(url: str) -> bool:
    """Does somebody answer there with a success?"""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (OSError, ValueError):
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
    """SIGTERM, SIGKILL for one that does not go, and for whatever it leaves behind in its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
