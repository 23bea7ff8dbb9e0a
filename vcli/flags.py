"""A frozen dataclass becomes command-line flags, environment twins and --print-config.

A field is written once, with its type, its help sentence and its default; a command that takes the dataclass and is
decorated with `with_flags` has all of it on the command line. What always holds: a flag beats its VCLI_<NAME>
variable, which beats the default.
"""

import functools
import inspect
import math
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from engine.errors import UserError


class FlagError(UserError):
    """A value that a flag or its environment twin cannot take; the process exits with 2."""


@dataclass(frozen=True)
class Flag:
    """One field of a config dataclass, seen from the command line."""

    field: str
    type: Any
    help: str
    default: Any
    is_secret: bool  # declared with field(repr=False): its value is never printed
    options: tuple[str, ...] = ()  # further words of its Annotated: its spellings, where not the field's
    is_hidden: bool = False  # declared with metadata=HIDDEN: --help names it alone

    @property
    def name(self) -> str:
        if self.options:
            return self.options[0].partition("/")[0]
        return "--" + self.field.removesuffix("_s").replace("_", "-")  # the unit is written with the value: 30s, 500ms

    @property
    def variable(self) -> str:
        return "VCLI_" + self.name.removeprefix("--").replace("-", "_").upper()

    @property
    def is_switch(self) -> bool:
        return bool in (self.type, *get_args(self.type))

    @property
    def is_repeated(self) -> bool:
        """May be given several times, each time with one or more values between commas: a tuple[str, ...]."""
        return self.type == tuple[str, ...]

    @property
    def is_seconds(self) -> bool:
        return self.field.endswith("_s")

    def parse(self, text: str, spelled: str) -> Any:
        """The value that `text` stands for. Raises FlagError naming the flag or variable as the person spelled it."""
        try:
            return parse_seconds(text) if self.is_seconds else parse_value(text, self.type)
        except ValueError as error:
            raise FlagError(f"{spelled} must be {error}, got {text!r}") from None


@dataclass(frozen=True)
class Setting:
    """A flag's value and where it came from: 'flag', 'environment' or 'default'."""

    flag: Flag
    value: Any
    source: str

    @property
    def spelled(self) -> str:
        return self.flag.variable if self.source == "environment" else self.flag.name


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give Typer a command that takes flags, and the command its config dataclasses made from them.

    Parameters of other types stay what they are: plain Typer options of that command.
    """
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    configs: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    flags = {name: flags_of(config) for name, config in configs.items()}

    @functools.wraps(command)
    def from_flags(*, print_config: bool, **given: Any) -> None:
        settings = {name: [resolve(flag, given.pop(flag.field)) for flag in flags[name]] for name in configs}
        if print_config:
            return print_settings([setting for group in settings.values() for setting in group])
        made = {name: _make(configs[name], settings[name]) for name in configs}
        return command(**made, **given)

    shown = [_parameter(flag, panel=_panel(configs[name])) for name in configs for flag in flags[name]]
    shown += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters if p.name not in configs]
    shown.append(_PRINT_CONFIG)
    assert len({p.name for p in shown}) == len(shown), "two config classes share a field name"
    from_flags.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    from_flags.__annotations__ = {p.name: p.annotation for p in shown}
    return from_flags


def _make(config: Any, settings: list[Setting]) -> Any:
    """A config of these values. What the dataclass itself refuses is said with the name that the person used."""
    try:
        return config(**{setting.flag.field: setting.value for setting in settings})
    except ValueError as error:
        field, _, complaint = str(error).partition(" ")
        setting = next((each for each in settings if each.flag.field == field), None)
        raise FlagError(f"{setting.spelled} {complaint}" if setting else str(error)) from None


class Command(TyperCommand):
    """A Typer command whose help lists the flags under their panels, one below the other, with no name cut short."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        hidden: list[str] = []
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
            elif getattr(parameter, "hidden", False):
                hidden.append(parameter.opts[0])
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records, col_max=34)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"For experts, see --print-config: {', '.join(hidden)}.")


def flags_of(config: type) -> list[Flag]:
    """The flags of a config dataclass, in the order of its fields."""
    hints = get_type_hints(config, include_extras=True)
    flags = []
    for field in fields(config):
        value_type, help_sentence, *options = get_args(hints[field.name])
        is_hidden = field.metadata.get("is_hidden", False)
        flags.append(
            Flag(field.name, value_type, help_sentence, field.default, not field.repr, tuple(options), is_hidden)
        )
    return flags


def resolve(flag: Flag, given: str | bool | list[str] | None) -> Setting:
    """A flag's value: what was given on the command line, else its environment variable, else the default."""
    if isinstance(given, bool):
        return Setting(flag, given, "flag")
    if isinstance(given, list):
        return Setting(flag, flag.parse(",".join(given), flag.name), "flag")
    if given is not None:
        return Setting(flag, flag.parse(given, flag.name), "flag")
    if text := os.environ.get(flag.variable, ""):
        return Setting(flag, flag.parse(text, flag.variable), "environment")
    return Setting(flag, flag.default, "default")


def print_settings(settings: list[Setting]) -> None:
    """Every value and where it came from, on stdout."""
    from vcli.console import print_table

    rows = [(s.flag.field, "(hidden)" if s.flag.is_secret and s.value else _shown(s.value), s.source) for s in settings]
    print_table("", ["name", "value", "from"], rows)


def parse_value(text: str, value_type: Any) -> Any:
    """`text` as a value of a field's type. Raises ValueError saying what would have been fine."""
    if get_origin(value_type) in (Union, types.UnionType):
        value_type = next(member for member in get_args(value_type) if member is not type(None))
    if get_origin(value_type) is Literal:
        choices = get_args(value_type)
        if text not in choices:
            raise ValueError(" or ".join(", ".join(choices).rsplit(", ", 1)))
        return text
    if get_origin(value_type) is tuple:
        return parse_list(text, get_args(value_type)[0])
    if get_origin(value_type) is dict:
        return parse_times(text)
    return _PARSERS[value_type](text)


def parse_list(text: str, value_type: Any) -> tuple[Any, ...]:
    """'1,16,64' -> (1, 16, 64); '1-256x4' -> (1, 4, 16, 64, 256): from, to and factor."""
    values: list[Any] = []
    if value_type is str:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    for item in text.split(","):
        match = re.fullmatch(r"(\d[^-]*)-(.+)x([\d.]+)", item.strip())
        if match is None:
            values.append(parse_value(item, value_type))
            continue
        value, last = (parse_value(edge, value_type) for edge in match.groups()[:2])
        factor = parse_float(match[3])
        if not (value > 0 and factor > 1 and last < math.inf):
            raise ValueError(
                "numbers such as 1,16,64 or a range such as 1-64x4, with an end and a factor of more than 1"
            )
        while value <= last:
            values.append(value)
            value = value_type(value * factor) if value_type(value * factor) > value else value + 1
    return tuple(values)


def parse_times(text: str) -> dict[str, float]:
    """'ttft=500ms,itl=30ms' -> {"ttft": 0.5, "itl": 0.03}"""
    pairs = [item.partition("=") for item in text.split(",")]
    try:
        return {name.strip(): parse_seconds(time) for name, _, time in pairs}
    except ValueError:
        raise ValueError("names and times such as ttft=500ms,itl=30ms") from None


def parse_int(text: str) -> int:
    """'8192', '8k' (8,000), '8K' (8,192), '2GB' (2 * 10^9), '2GiB' or '2G' (2 * 2^30): as vLLM reads them."""
    match = re.fullmatch(
        r"(-?\d+(?:\.\d+)?)\s*(?:([kmgt])b?|([KMGT])(?:iB)?|([KMGT])B)?", text.strip().replace(",", "")
    )
    if match is None:
        raise ValueError("a whole number such as 4096, 32k or 8GiB")
    number, decimal, binary, decimal_bytes = match.groups()
    exponent = "kmgt".index((decimal or binary or decimal_bytes).lower()) + 1 if match.lastindex != 1 else 0
    value = float(number) * (1024 if binary else 1000) ** exponent
    if value != int(value):
        raise ValueError("a whole number such as 4096, 32k or 8GiB")
    return int(value) if "." in number else int(number) * (1024 if binary else 1000) ** exponent


def parse_seconds(text: str) -> float:
    """'30', '30s', '500ms', '2min' -> seconds"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?", text.strip())
    if match is None:
        raise ValueError("a time such as 30s, 500ms or 2min")
    return float(match[1]) * {"ms": 0.001, "s": 1, "min": 60, "m": 60, "h": 3600}[match[2] or "s"]


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: parse_int,
    float: parse_float,
    bool: parse_bool,
    str: str,
    Path: Path,
}

_METAVARS: dict[Any, str] = {int: "INT", float: "NUMBER", Path: "FILE"}

_PRINT_CONFIG = inspect.Parameter(
    "print_config",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--print-config", help="Print every value and where it came from.")],
)


def _parameter(flag: Flag, panel: str) -> inspect.Parameter:
    """What Typer sees of a flag: raw text (None when absent), which `resolve` turns into the value."""
    help_text = flag.help[:1].upper() + flag.help[1:] + _default_note(flag)
    if flag.field == "model":
        argument = typer.Argument(metavar="MODEL", help=help_text, show_default=False, rich_help_panel="Model")
        return _keyword(flag.field, Annotated[str | None, argument])
    if flag.is_switch:
        names = flag.options or (f"{flag.name}/--no-{flag.name[2:]}",)
        switch = typer.Option(*names, help=help_text, show_default=False, rich_help_panel=panel, hidden=flag.is_hidden)
        return _keyword(flag.field, Annotated[bool | None, switch])
    names = flag.options or (flag.name,)
    option = typer.Option(
        *names,
        metavar=_metavar(flag),
        help=help_text,
        show_default=False,
        rich_help_panel=panel,
        hidden=flag.is_hidden,
    )
    return _keyword(flag.field, Annotated[list[str] | None if flag.is_repeated else str | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _panel(config: type) -> str:
    return config.__name__.removesuffix("Config") + " options"


def _metavar(flag: Flag) -> str:
    if flag.is_seconds:
        return "TIME"
    members = [member for member in get_args(flag.type) if member is not type(None)]
    if get_origin(flag.type) is Literal:
        return "|".join(members)
    value_type = members[0] if members else flag.type
    if get_origin(value_type) is Literal:
        return "|".join(get_args(value_type))
    if get_origin(value_type) is tuple:
        return _METAVARS[get_args(value_type)[0]] + ",..."
    return "NAME=TIME,..." if get_origin(value_type) is dict else _METAVARS.get(value_type, "TEXT")


def _default_note(flag: Flag) -> str:
    if flag.default in (None, "", ()) or flag.is_secret or (flag.is_switch and flag.options):
        return "."
    return f" (default: {_shown(flag.default)}{'s' if flag.is_seconds else ''})."


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "-"
    if isinstance(value, dict):
        return ",".join(f"{name}={seconds:g}s" for name, seconds in value.items())
    return "-" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)
