"""`vcli profile`: where a step's time goes, what the device could do at best, and which flag to try."""

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.config import ProfileConfig
from engine.config import EngineConfig
from vcli.flags import with_flags

if TYPE_CHECKING:
    from bench.profile_report import Report


@with_flags
def profile(engine: EngineConfig, options: ProfileConfig) -> None:
    """Tell where the time of a model's steps goes, and what to do about it.

    Runs the model in this process under a steady load: so many requests at any time, a new one for each that ends. Then
    some steps are looked into, kernel by kernel on a GPU and op by op on a CPU, beside the bytes and FLOPs that they
    cannot do without and what this device was measured to reach. It ends with the bottleneck, the evidence and the flag
    to try, and tries the first.
    """
    from bench.advice import Check
    from bench.profile import compare, measure_device
    from bench.profile import profile as measure
    from bench.profile_report import Report
    from vcli.console import Status

    with Status() as status:
        status.show("measuring what the device reaches")
        ceilings = measure_device(engine)
        report = Report.of(measure(engine, options, ceilings, status.show_share))
        if options.check and (first := report.first_to_try):
            status.show("trying the first advice")
            changed = replace(engine, **first.changes), replace(options, **first.load)
            rates = compare(report.profile, *changed, status.show_share)
            report = replace(report, checked=first, check=Check(*rates))
    _print(report, as_json=options.json)
    if options.output:
        from bench.profile_report import to_result

        options.output.write_text(to_result(report).to_json(), encoding="utf-8")


def _print(report: "Report", as_json: bool) -> None:
    from bench import profile_report as shown
    from vcli.console import out, print_table

    profile = report.profile
    if as_json:
        out.out(shown.to_result(report).to_json(), end="", highlight=False)
        return
    print_table(shown.describe(profile), *shown.part_table(profile), notes=[shown.ceilings_note(profile), ""])
    print_table("", *shown.stage_table(profile), notes=[""])
    print_table("", *shown.batch_table(profile), notes=[""])
    print_table("", *shown.memory_table(profile), notes=[""])
    for line in shown.sentences(report):
        out.print(line, markup=False)
    for name, text in shown.DEFINITIONS.items():
        out.print(f"{name}: {text}", markup=False, style="dim")
