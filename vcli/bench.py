"""`vcli bench`: measure a model through a server started for it, a server that runs somewhere, or without one.

With --quality it holds one checkpoint against another.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import typer

from bench.config import BenchConfig, QualityConfig
from engine.config import EngineConfig
from vcli.flags import FlagError, flags_of, with_flags

if TYPE_CHECKING:
    from bench.quality import Quality
    from bench.result import BenchResult
    from bench.serving import RunProgress
    from vcli.console import Status

EXIT_UNDECIDED = 4


@with_flags
def bench(engine: EngineConfig, options: BenchConfig, quality: QualityConfig) -> None:
    """Measure latency and throughput of a model, or of a server that runs already; or what a checkpoint lost.

    Starts a server for MODEL (or takes --url), warms up, sends requests that generate exactly their output length,
    and prints the percentiles with their definitions. Exit code 4: the client was too slow for the server, and the
    figures say nothing about it.

    `vcli bench --quality BEFORE AFTER` compares two checkpoints with one vocabulary: perplexity, KL divergence, size
    and speed. Flags hold for both, but --quantization and --kv-cache-dtype for AFTER alone: so their price can be told,
    too. Exit code 3: a gate, --max-ppl-increase or --max-kl, was not passed.
    """
    from bench import output, quality_report, report
    from bench.run import with_baseline
    from vcli.console import Status

    if options.output:
        if options.quality:
            output.check(options.output, quality_report.FORMATS)
        else:
            report.check(options.output, has_requests=not options.offline)
    if options.quality:
        _compare(engine, options, quality)
        return
    if quality != QualityConfig():
        raise FlagError("--text, --windows, --max-ppl-increase and --max-kl belong to --quality BEFORE AFTER")
    result = _offline(engine, options) if options.offline else _serving(engine, options)
    if options.baseline != "none":
        with Status() as status:
            status.show("running the transformers baseline")
            result = with_baseline(result, engine, options)
    show_result(result, as_json=options.json)
    if options.output:
        report.write(result, options.output)
    if not result.is_valid:
        has_figures = all(run.metrics["completed"] for run in result.runs or [result])
        raise typer.Exit(EXIT_UNDECIDED if has_figures else 1)


def _compare(engine: EngineConfig, options: BenchConfig, gates: QualityConfig) -> None:
    from bench.quality import measure
    from bench.quality_report import write_file
    from vcli.console import Status

    if not engine.model:
        raise FlagError("--quality needs two checkpoints: vcli bench --quality BEFORE AFTER")
    before = replace(engine, model=options.quality, quantization="auto", kv_cache_dtype="auto")
    with Status() as status:
        quality = measure(before, engine, gates, on_progress=status.show_share)
    if options.output:
        write_file(quality, options.output)
    show_quality(quality, gates, as_json=options.json)


def show_quality(quality: "Quality", gates: QualityConfig, as_json: bool = False) -> None:
    """A comparison on stdout. If it does not pass the gates, the command ends with exit code 3, and says why."""
    from bench import quality_report
    from bench.quality import EXIT_GATE
    from vcli.console import console, out, print_table

    if as_json:
        out.out(quality_report.to_json(quality), end="", highlight=False)
    else:
        notes = ["", *quality_report.notes(quality)]
        print_table(quality_report.describe(quality), *quality_report.quality_table(quality), notes=notes)
    if failures := quality.failures(gates):
        for sentence in failures:
            console.print(f"vcli: {sentence}", style="red", markup=False)
        raise typer.Exit(EXIT_GATE)


def _serving(engine: EngineConfig, options: BenchConfig) -> "BenchResult":
    from bench.run import run_sweep, serving_workloads
    from bench.server import running_server
    from vcli.console import Status

    workloads = serving_workloads(engine, options)
    with Status() as status:
        if options.url:
            return run_sweep(engine, options, options.url, workloads, partial(_show_run, status))
        status.show("starting the server")
        with running_server(serve_arguments(engine), partial(_show_start, status)) as url:
            return run_sweep(engine, options, url, workloads, partial(_show_run, status))


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
    from bench.run import run_latency, run_offline
    from vcli.console import Status

    with Status() as status:
        if options.batch_sizes is not None:
            return run_latency(engine, options, partial(_show_start, status), status.show)

        def show_run(num_done: int, num_tokens: int) -> None:
            status.show("measuring", num_done, options.num_requests, detail=f"{num_tokens:,} tokens")

        return run_offline(engine, options, partial(_show_start, status), show_run)


def show_result(result: "BenchResult", as_json: bool) -> None:
    """The result on stdout; what makes it worthless on stderr."""
    from bench import report
    from vcli.console import console, out, print_table

    if as_json:
        out.out(result.to_json(), end="", highlight=False)
    else:
        *others, last = report.tables(result)
        for table in others:
            print_table(report.describe(result), *table)
        notes = [f"{name}: {text}" for name, text in result.definitions.items()]
        as_markdown = result.kind == "latency"  # it is there to be pasted
        print_table("" if others else report.describe(result), *last, notes=["", *notes], as_markdown=as_markdown)
    for run in result.runs or [result]:
        where = f"{report.describe_workload(run)}: " if result.runs else ""
        for error, count in run.metrics.get("errors", {}).items():
            console.print(f"{where}{count} failed: {error}", style="red", markup=False)
        for reason in run.metrics.get("invalid_reasons", []):
            console.print(f"{where}not a valid result: {reason}", style="red", markup=False)


def _show_start(status: "Status", stage: str, fraction: float) -> None:
    status.show_share(f"starting: {stage}", fraction)


def _show_run(status: "Status", progress: "RunProgress") -> None:
    rate = progress.num_output_tokens / progress.elapsed_s if progress.elapsed_s else 0.0
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    status.show(progress.stage, progress.num_done, progress.num_requests, detail=f"{rate:,.0f} tok/s{failed}")
