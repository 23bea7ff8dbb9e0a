"""A process that renders chat templates, and can do nothing else: `python -m vcli.server.template_process`.

A template is a program that came with the model, of which nobody can say how long it runs or how much memory it
takes. jinja2's sandbox keeps it to plain data; this process keeps its appetite from the rest of the server. It reads
requests from stdin and writes replies to stdout, has MAX_MEMORY_BYTES, and can open no file and no connection.
"""

import contextlib
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

MAX_MEMORY_BYTES = 2 * 2**30
LENGTH_BYTES = 4


def main() -> None:
    import jinja2.debug  # noqa: F401 (jinja2 imports it when a template fails, and nothing can be imported by then)
    import setproctitle

    from engine import log
    from engine.chat_template import render_chat
    from engine.child import die_with_parent

    setproctitle.setproctitle("vcli: templates")
    log.set_up("templates", log.format_for_children())
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API process's to act on
    render_chat("{{ strftime_now('%Z') }}{{ [1] | tojson }}", [])  # what is loaded at first use is loaded now
    _give_up_rights()
    while (request := _read_frame(sys.stdin.buffer)) is not None:
        template, variables = msgspec.json.decode(request, type=tuple[str, dict])
        try:
            reply = msgspec.json.encode((True, render_chat(template, **variables)))
        except ValueError as error:
            reply = msgspec.json.encode((False, str(error)))
        sys.stdout.buffer.write(len(reply).to_bytes(LENGTH_BYTES, "big") + reply)
        sys.stdout.buffer.flush()


def _give_up_rights() -> None:
    """Limits for good: the hard ones are lowered, too."""
    limits = {
        "RLIMIT_AS": MAX_MEMORY_BYTES,
        "RLIMIT_NOFILE": 0,  # those that are open stay open
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has them all
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _read_frame(stream: BinaryIO) -> bytes | None:
    """One request. None at the end: the server has closed its side."""
    length = stream.read(LENGTH_BYTES)
    return stream.read(int.from_bytes(length, "big")) if length else None


if __name__ == "__main__":
    main()
