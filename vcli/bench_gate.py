"""`vcli bench gate`: has this code become slower than another revision, a server, or what was recorded?"""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bench.config import GateConfig
from engine.config import EngineConfig
from vcli.bench import serve_arguments
from vcli.flags import with_flags

if TYPE_CHECKING:
    from bench.gate import Gate


@with_flags
def gate(engine: EngineConfig, options: GateConfig) -> None:
    """Hold this code's speed against another's, by paired trials, until a sequential test decides.

    Serves MODEL twice, by this code and by another revision of it (of a git checkout), and sends both the same requests
    in turn, in an order drawn by a coin. Exit code 0: every --metric is within its limit. 3: one regressed, and did so
    again after both were started anew; unchanged code is called so in less than 1 % of gates. 4: undecided within
    --budget.

    `vcli bench gate --against main --metric "throughput>=-3%" --metric "p99_itl<=+5%"`
    """
    from bench import gate_report, output
    from bench.gate import EXIT_CODES, run_gate
    from bench.limits import Verdict
    from vcli.console import Status, out, print_table

    for path in options.output:
        output.check(Path(path), gate_report.FORMATS)
    with Status() as status:

        def show_start(stage: str, share: float) -> None:
            status.show_share(f"starting: {stage}", share)

        def show_pair(so_far: "Gate", share_of_budget: float) -> None:
            status.show("measuring pairs of trials", round(share_of_budget * 100), 100, detail=so_far.describe())

        result = run_gate(engine, options, serve_arguments, show_start, show_pair)
    for path in options.output:
        gate_report.write(result, Path(path))
    if options.json:
        out.out(result.to_json(), end="", highlight=False)
    else:
        notes = [
            "",
            gate_report.conclusion(result),
            "",
            *(f"{name}: {text}" for name, text in result.definitions.items()),
        ]
        print_table(gate_report.title(result), *gate_report.limit_table(result), notes=notes)
    if code := EXIT_CODES[Verdict(result.metrics["verdict"])]:
        raise typer.Exit(code)
