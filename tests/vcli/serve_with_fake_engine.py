"""`vcli` itself, but for the engine process behind it."""

import sys
from pathlib import Path

import engine.link
from vcli.cli import main

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")

engine.link.module_command = lambda *_: [sys.executable, str(FAKE_ENGINE)]
main()
