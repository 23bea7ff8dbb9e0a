"""`vcli bench compare`: this engine and others, side by side on the same requests."""

from pathlib import Path

import typer

from bench.config import CompareConfig
from engine.config import EngineConfig
from vcli.bench import EXIT_UNDECIDED, serve_arguments, show_result
from vcli.flags import with_flags


@with_flags
def compare(engine: EngineConfig, options: CompareConfig) -> None:
    """Measure engines side by side: the same model, settings and requests, the same client.

    Starts each engine that is installed, here or in the virtual environment that --env names, tells it the same
    settings, and runs the same load a few times; then all of them again in the opposite order. Prints medians with
    their intervals, the ratio to the first engine, start-up time, memory and commands. An engine that is missing or
    fails is a row that says so. Exit code 4: the client was too slow for somebody's server.

    `vcli bench compare MODEL --engines vcli,vllm --env vllm=~/vllm-venv --output report.html`
    """
    from bench import report
    from bench.compare import run_compare
    from vcli.console import Status, print_table

    for path in options.output:
        report.check(Path(path), has_requests=False)
    with Status() as status:
        result = run_compare(engine, options, serve_arguments, status.show_share)
    if not options.json:
        rows = [[row["name"], row["command"], row["note"]] for row in result.engines or []]
        print_table("", ["engine", "command", ""], rows)
    show_result(result, as_json=options.json)
    for path in options.output:
        report.write(result, Path(path))
    if not any(row["rounds"] for row in result.engines or []):
        raise typer.Exit(1)
    if not result.is_valid:
        raise typer.Exit(EXIT_UNDECIDED)
