"""`vcli` itself, but for the engine process behind it.

With FAKE_AUDIT=FILE, whatever Python opens, connects to, starts, imports or unpickles is written there, line by line.
"""

import os
import sys
from pathlib import Path

import engine.link
from vcli.cli import main

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")

AUDITED = ("open", "os.", "shutil.", "socket.", "urllib.", "http.", "subprocess.", "import", "pickle.", "ctypes.dlopen")


def audit(file: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(AUDITED):
            os.write(fd, f"{event} {arguments[:2]!r}\n".encode())

    sys.addaudithook(note)


if file := os.environ.get("FAKE_AUDIT"):
    audit(file)
engine.link.module_command = lambda *_: [sys.executable, str(FAKE_ENGINE)]
main()
