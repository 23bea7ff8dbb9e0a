"""The frame of what is run as `python -m bench.NAME`: the flags that all have, the file of the result, the exit code.

Exit codes: 0 measured and fine, 3 measured and not as it should be, 4 measured and undecided, 1 it could not run, 2 a
wrong flag.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import output
from bench.environment import environment
from engine.errors import UserError

EXIT_CODES = {True: 0, False: 3, None: 4}


def parser(name: str, description: str | None, *, starts_server: bool = True) -> argparse.ArgumentParser:
    """With MODEL and --output; description: of which the first line is shown."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=(description or "").partition("\n")[0],
        epilog="after --: flags of vcli serve" if starts_server else None,
    )
    made.add_argument("model", nargs="?", default="", help="as vcli serve takes it; default: its own default model")
    made.add_argument("--output", type=Path, help="JSON file for the result")
    return made


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the arguments of the server that it starts: MODEL, and what stands after `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    return options, [*filter(None, [options.model]), *arguments[end + 1 :]]


def run(name: str, path: Path | None, measure: Callable[[], tuple[dict[str, Any], bool | None]]) -> int:
    """Measure and write the result; the exit code.

    measure: gives the result, and whether it is as it should be (None: undecided). What it raises as UserError is one
    sentence to the person.
    """
    facts = {"kind": name, "environment": environment()}
    try:
        if path:
            output.check(path, [".json"])
        result, is_fine = measure()
        if path:
            output.write(path, {".json": lambda: json.dumps(facts | result, indent=1, ensure_ascii=False) + "\n"})
    except UserError as error:
        print(f"bench.{name}: {error}", file=sys.stderr)
        return 1
    return EXIT_CODES[is_fine]
