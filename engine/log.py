"""The log on stderr: lines for people or, with --log-format json, for machines.

What always holds in JSON: whatever Python writes to stderr in a process of the server, and all that the engine's
process writes there, comes out as lines that are one object each, with time, level, process, logger and message.
Python's writing is caught where it is written; what libraries of the engine write around Python passes by the API
process (`Relay`).
"""

import datetime
import io
import logging
import os
import sys
import threading
from typing import IO, Any

import msgspec

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
RELAY_END_S = 1.0  # for the last words of a process that is gone: its own children may hold the pipe open

_lock = threading.Lock()


def format_for_children() -> str:
    """'text' or 'json', as the process was told that started this one; `vcli serve` tells it by its environment."""
    return os.environ.get("VCLI_LOG_FORMAT", "text")


def set_up(process: str, log_format: str) -> None:
    """Log from here on as `log_format` says. process: the name of this one, 'api' or 'engine'"""
    if log_format == "text":
        logging.basicConfig(format=TEXT_FORMAT, stream=sys.stderr)
        return
    logging.basicConfig(handlers=[_JsonHandler(process)], force=True)
    logging.captureWarnings(True)
    sys.stderr = _Lines(process)
    log = logging.getLogger("vcli")
    sys.excepthook = lambda *error: log.critical("the process ends", exc_info=error)
    threading.excepthook = lambda error: log.error(
        "a thread ends", exc_info=(error.exc_type, error.exc_value or error.exc_type(), error.exc_traceback)
    )


class Relay:
    """Lines of another process's stderr, on to this one's: objects as they are, others made into objects."""

    def __init__(self, stream: IO[bytes], process: str) -> None:
        self._stream, self._process = stream, process
        self._thread = threading.Thread(target=self._run, name="log-relay", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Return when all is written that the process, which has ended, has said."""
        self._thread.join(RELAY_END_S)

    def _run(self) -> None:
        with self._stream:
            for line in self._stream:
                if line.startswith(b'{"time":') and line.endswith(b"}\n"):
                    _write(line)
                elif text := line.decode(errors="replace").strip():
                    _write(_line("warning", self._process, "stderr", text))


class _JsonHandler(logging.Handler):
    """A record becomes an object; `extra={"fields": {...}}` become its fields, and its message their name, `event`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {}
            message = record.getMessage()
            if event := getattr(record, "event", None):
                message, fields = event, {event: record.fields}  # type: ignore[attr-defined]
            if record.exc_info and record.exc_info[0]:
                fields["exception"] = logging.Formatter().formatException(record.exc_info)
            _write(_line(record.levelname.lower(), self.process, record.name, message, record.created, **fields))
        except Exception:
            self.handleError(record)


class _Lines(io.TextIOBase):
    """Stands for sys.stderr: what is printed there becomes an object a line."""

    encoding = "utf-8"

    def __init__(self, process: str) -> None:
        self._process, self._rest, self._turn = process, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._turn:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                _write(_line("info", self._process, "stderr", line))
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


def _line(level: str, process: str, logger: str, message: str, at: float | None = None, **fields: Any) -> bytes:
    now = datetime.datetime.now(datetime.UTC) if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
    entry = {
        "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "process": process,
        "logger": logger,
        "message": message.removeprefix("vcli: ").rstrip().encode(errors="replace").decode(),
        **fields,
    }
    return msgspec.json.encode(entry) + b"\n"


def _write(line: bytes) -> None:
    with _lock:
        while line:
            line = line[os.write(2, line) :]
