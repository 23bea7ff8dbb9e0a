"""`vcli profile`: where a step's time goes, what the device could do at best, and which flag to try."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bench.config import ProfileConfig
from engine.config import EngineConfig
from vcli.flags import FlagError, with_flags

if TYPE_CHECKING:
    from bench.profile_report import Report
    from bench.report import Table
    from bench.result import BenchResult
    from vcli.console import Status


@with_flags
def profile(engine: EngineConfig, options: ProfileConfig) -> None:
    """Tell where the time of a model's steps goes, and what to do about it.

    Runs the model in this process under a steady load: so many requests at any time, a new one for each that ends. Then
    some steps are looked into, kernel by kernel on a GPU and op by op on a CPU, beside the bytes and FLOPs that they
    cannot do without and what this device was measured to reach. It ends with the bottleneck, the evidence and the flag
    to try, and tries the first.

    With --url it watches the engine of a `vcli serve` at work instead, through its metrics.
    """
    if options.url:
        if engine.model:
            raise FlagError("MODEL and --url exclude each other: a server has a model already")
        _watch(options)
    else:
        _profile(engine, options)


def _profile(engine: EngineConfig, options: ProfileConfig) -> None:
    from bench import profile_report as shown
    from vcli.console import Status

    with Status() as status:
        report = _measure(engine, options, status)
    measured = report.profile
    tables = [
        ("", shown.stage_table(measured)),
        ("", shown.batch_table(measured)),
        ("", shown.memory_table(measured)),
    ]
    parts = f"{shown.describe(measured)}\n{shown.ceilings_note(measured)}", shown.part_table(measured)
    _tell([parts, *tables], shown.sentences(report), shown.to_result(report), options)


def _measure(engine: EngineConfig, options: ProfileConfig, status: "Status") -> "Report":
    from bench import output
    from bench.advice import Check
    from bench.profile import compare, measure_device
    from bench.profile import profile as measure
    from bench.profile_report import Report

    if options.trace:
        output.make_folder("--trace", options.trace)
    status.show("measuring what the device reaches")
    ceilings = measure_device(engine)
    report = Report.of(measure(engine, options, ceilings, status.show_share))
    if not options.check or (first := report.first_to_try) is None:
        return report
    status.show("trying the first advice")
    changed = replace(engine, **first.changes), replace(options, **first.load)
    return replace(report, checked=first, check=Check(*compare(report.profile, *changed, status.show_share)))


def _watch(options: ProfileConfig) -> None:
    from bench import watch as shown
    from bench.advice import in_words
    from vcli.console import Status

    with Status() as status:
        watched = shown.watch(options.url, options.duration_s, status.show_share, options.api_key)
    tables = [(shown.describe(watched), shown.stage_table(watched)), ("", shown.batch_table(watched))]
    _tell(tables, in_words(shown.advise(watched)), shown.to_result(watched), options)


def _tell(
    tables: Sequence[tuple[str, "Table"]], sentences: list[str], result: "BenchResult", options: ProfileConfig
) -> None:
    """Tables, what they come to, and what their words mean; or JSON."""
    from bench import output, profile_page
    from vcli.console import out, print_table

    if options.json:
        out.out(result.to_json(), end="", highlight=False)
    else:
        for title, table in tables:
            print_table(title, *table, notes=[""])
        for line in sentences:
            out.print(line, markup=False)
        out.print()
        for name, text in result.definitions.items():
            out.print(f"{name}: {text}", markup=False, style="dim")
    if options.output:
        html = partial(profile_page.to_html, result, tables[0][0].partition("\n")[0], tables, sentences)
        output.write(options.output, {".json": result.to_json, ".html": html})
