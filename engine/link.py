"""The engine process as the API process sees it: one child, one socket, one thread that serves both.

The process starts with the link, the talk with `open`. The thread alone touches the socket. `send` may be called from
anywhere; what the engine says arrives in `on_messages`, on the link's thread, everything that is there in one call;
`on_exit` comes last, once, whatever ended the process.
"""

import collections
import contextlib
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable

import zmq

from engine import messages
from engine.child import module_command, module_environment
from engine.log import Relay, format_for_children

POLL_MS = 200  # how soon the death of a silent engine is noticed, where the system does not tell of it
FAREWELL_S = 5.0  # for the engine to end by itself


class EngineLink:
    """Owns the engine process and the socket to it."""

    def __init__(self, command: list[str] | None = None, *, is_standby: bool = False) -> None:
        """command: of the process, to which the socket's address is added. A standby gets ready for its Start."""
        self._directory = tempfile.TemporaryDirectory(prefix="vcli-", dir=_short_temporary_directory())  # mode 0700
        self.command = command or module_command("engine.process")
        address = f"ipc://{self._directory.name}/engine.sock"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.bind(address)
        self._outbox: collections.deque[messages.ToEngine] = collections.deque()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        # Started on the caller's thread: the engine ends when the thread that started it does. Its own session keeps
        # the terminal's Ctrl-C away from it.
        self.process = subprocess.Popen(
            [*self.command, address, *(["standby"] if is_standby else [])],
            env=module_environment(),
            start_new_session=True,
            stderr=subprocess.PIPE if format_for_children() == "json" else None,
        )
        self._relay = Relay(self.process.stderr, "engine") if self.process.stderr else None
        # Becomes readable when the process ends.
        self._exit_fd = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None
        self._thread: threading.Thread | None = None

    def open(self, on_messages: Callable[[list[messages.FromEngine]], None], on_exit: Callable[[int], None]) -> None:
        """Begin to carry messages, once."""
        self._on_messages, self._on_exit = on_messages, on_exit
        self._thread = threading.Thread(target=self._run, name="engine-link", daemon=True)
        self._thread.start()

    @property
    def is_warm(self) -> bool:
        """Has a standby said that it is ready? To be asked before `open`."""
        return self.process.poll() is None and bool(self._socket.poll(0))

    def send(self, message: messages.ToEngine) -> None:
        self._outbox.append(message)
        with contextlib.suppress(OSError):  # full: the thread is about to wake anyway; closed: nobody is left to tell
            self._wake_in.send(b"\0")

    def close(self, wait_s: float = FAREWELL_S) -> None:
        """End the engine and wait for it: asked first, then killed."""
        self.send(messages.Shutdown())
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.wait()
        if self._thread is not None:
            self._thread.join()
        else:
            self._release()

    def kill(self) -> None:
        """End the engine, and whatever it started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:  # a frame that is no message, or a loop that is gone: the engine has nobody to work for
            logging.getLogger("vcli").exception("what the engine says cannot be understood")
            self.kill()
        returncode = self.process.wait()
        self._release()
        self._on_exit(returncode)

    def _release(self) -> None:
        if self._relay is not None:
            self._relay.finish()
        if self._exit_fd is not None:
            os.close(self._exit_fd)
        self._socket.close()
        self._context.term()
        self._wake_in.close()
        self._wake_out.close()
        self._directory.cleanup()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_out, zmq.POLLIN)
        if self._exit_fd is not None:
            poller.register(self._exit_fd, zmq.POLLIN)
        while True:
            has_exited = self.process.poll() is not None  # asked before reading: its last words are read after it
            poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._outbox and not has_exited else 0))
            poller.poll(POLL_MS)
            with contextlib.suppress(BlockingIOError):
                self._wake_out.recv(4096)
            self._send_outbox()
            received = self._receive()
            if received:
                self._on_messages(received)
            elif has_exited:
                return

    def _send_outbox(self) -> None:
        """Send what waits, as soon as the engine has connected."""
        while self._outbox:
            try:
                self._socket.send(messages.encode(self._outbox[0]), zmq.NOBLOCK)
            except zmq.Again:
                return
            self._outbox.popleft()

    def _receive(self) -> list[messages.FromEngine]:
        received = []
        while True:
            try:
                received.append(messages.decode_from_engine(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return received


def describe_exit(returncode: int) -> str:
    """The end of a process that left no message, in words."""
    if returncode >= 0:
        return f"the engine process ended with exit code {returncode}: its last lines in the log say why"
    name = next((each.name for each in signal.Signals if each == -returncode), f"signal {-returncode}")
    hint = " (often the system's answer to too little memory)" if name == "SIGKILL" else ""
    return f"the engine process was ended by {name}{hint}"


def _short_temporary_directory() -> str | None:
    """A socket's path has about 100 characters; a long TMPDIR takes too many of them."""
    return None if len(tempfile.gettempdir()) < 64 else "/tmp"
