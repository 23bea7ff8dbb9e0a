"""`vcli bench`: measure a model through a server started for it, a server that runs somewhere, or without one."""

from functools import partial
from typing import TYPE_CHECKING

import typer

from bench.config import BenchConfig
from engine.config import EngineConfig
from vcli.flags import flags_of, with_flags

if TYPE_CHECKING:
    from bench.result import BenchResult
    from bench.serving import RunProgress
    from vcli.console import Status

EXIT_UNDECIDED = 4


@with_flags
def bench(engine: EngineConfig, options: BenchConfig) -> None:
    """Measure latency and throughput of a model, or of a server that runs already.

    Starts a server for MODEL (or takes --url), warms up, sends requests that generate exactly their output length,
    and prints the percentiles with their definitions. Exit code 4: the client was too slow for the server, and the
    figures say nothing about it.
    """
    from bench import report
    from bench.run import with_baseline
    from vcli.console import Status

    if options.output:
        report.check_extension(options.output)
    result = _offline(engine, options) if options.offline else _serving(engine, options)
    if options.baseline != "none":
        with Status() as status:
            status.show("running the transformers baseline")
            result = with_baseline(result, engine, options)
    _print(result, as_json=options.json)
    if options.output:
        report.write(result, options.output)
    if not result.is_valid:
        raise typer.Exit(EXIT_UNDECIDED if result.metrics["completed"] else 1)


def _serving(engine: EngineConfig, options: BenchConfig) -> "BenchResult":
    from bench.run import run_serving, serving_requests
    from bench.server import running_server
    from vcli.console import Status

    requests = serving_requests(engine, options)
    with Status() as status:
        if options.url:
            return run_serving(engine, options, options.url, requests, partial(_show_run, status))
        status.show("starting the server")
        with running_server(serve_arguments(engine), partial(_show_start, status)) as url:
            return run_serving(engine, options, url, requests, partial(_show_run, status))


def serve_arguments(config: EngineConfig) -> list[str]:
    """The command line that says what `config` says; what is as by default is left out."""
    arguments = [config.model] if config.model else []
    for flag in flags_of(EngineConfig):
        value = getattr(config, flag.field)
        if flag.field == "model" or value == flag.default:
            continue
        if isinstance(value, bool):
            arguments.append(flag.name if value else f"--no-{flag.name[2:]}")
        else:
            arguments += [flag.name, str(value)]
    return arguments


def _offline(engine: EngineConfig, options: BenchConfig) -> "BenchResult":
    from bench.run import run_offline
    from vcli.console import Status

    with Status() as status:

        def show_run(num_done: int, num_tokens: int) -> None:
            status.show("measuring", num_done, options.num_requests, detail=f"{num_tokens:,} tokens")

        return run_offline(engine, options, partial(_show_start, status), show_run)


def _print(result: "BenchResult", as_json: bool) -> None:
    """The result on stdout; what makes it worthless on stderr."""
    from bench import report
    from vcli.console import console, out, print_table

    if as_json:
        out.out(result.to_json(), end="", highlight=False)
    else:
        columns, rows = report.latency_table(result)
        if rows:
            print_table(report.describe(result), columns, rows)
        notes = [f"{name}: {text}" for name, text in result.definitions.items()]
        print_table("" if rows else report.describe(result), *report.figure_table(result), notes=["", *notes])
    for error, count in result.metrics.get("errors", {}).items():
        console.print(f"{count} failed: {error}", style="red", markup=False)
    for reason in result.metrics.get("invalid_reasons", []):
        console.print(f"not a valid result: {reason}", style="red", markup=False)


def _show_start(status: "Status", stage: str, fraction: float) -> None:
    status.show(f"starting: {stage}", round(fraction * 100), 100)


def _show_run(status: "Status", progress: "RunProgress") -> None:
    rate = progress.num_output_tokens / progress.elapsed_s if progress.elapsed_s else 0.0
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    status.show(progress.stage, progress.num_done, progress.num_requests, detail=f"{rate:,.0f} tok/s{failed}")
