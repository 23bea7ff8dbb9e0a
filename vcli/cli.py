"""The commands and their help. What a command needs is imported when it runs, so that help is instant."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from engine.errors import UserError
from vcli.bench import bench
from vcli.bench_compare import compare
from vcli.bench_gate import gate
from vcli.flags import Command, FlagError
from vcli.profile import profile
from vcli.quantize import quantize
from vcli.serve import serve


class Commands(TyperGroup):
    """Commands of one word or two: `vcli bench MODEL` beside `vcli bench gate`. (A folder of that name is ./gate.)"""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = " ".join(args[:2])
        return (name, self.commands[name], args[2:]) if name in self.commands else super().resolve_command(ctx, args)


app = typer.Typer(
    name="vcli",
    cls=Commands,
    help="Serve and benchmark open-weight language models. Every flag has an environment twin: --max-model-len is "
    "VCLI_MAX_MODEL_LEN. Numbers may carry units: 32k, 8GiB, 500ms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)


def main() -> None:
    """The console entry. Exit codes: 0 fine, 1 error, 2 usage, 3 a gate was not passed, 4 nothing could be decided."""
    try:
        app(prog_name="vcli")
    except UserError as error:
        print(f"vcli: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FlagError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        from vcli.version import version

        print(version())
        raise typer.Exit()


@app.callback()
def _vcli(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(cls=Command)(serve)
app.command(cls=Command, short_help="Measure latency and throughput of a model.")(bench)
app.command("bench compare", cls=Command, short_help="Measure engines side by side.")(compare)
app.command("bench gate", cls=Command, short_help="Has this code become slower than another?")(gate)
app.command(cls=Command, short_help="Tell where a step's time goes, and what to do about it.")(profile)
app.command(cls=Command, short_help="Make a quantized checkpoint of a model.")(quantize)
