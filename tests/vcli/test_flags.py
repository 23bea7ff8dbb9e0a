"""Config dataclasses as flags: where values come from, and what they may look like."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from bench.config import BenchConfig
from engine.config import EngineConfig
from vcli.flags import FlagError, flags_of, parse_int, parse_seconds, parse_value, resolve, with_flags
from vcli.server.config import ServerConfig


@dataclass(frozen=True)
class Config:
    size: Annotated[int, "how large"] = 7
    limit: Annotated[int | None, "how much"] = None
    mode: Annotated[Literal["fast", "slow"], "which way"] = "fast"
    share: Annotated[float, "how much of it"] = 0.5
    wait_s: Annotated[float, "how long"] = 30.0
    cached: Annotated[bool, "remember things"] = True
    file: Annotated[Path | None, "where"] = None
    name: Annotated[tuple[str, ...], "who"] = ("Ada",)
    api_key: Annotated[str, "password"] = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must not be negative, got {self.size}")


BENCH_FLAGS = flags_of(BenchConfig)
FLAGS = {flag.field: flag for flag in flags_of(Config)}


def run(*arguments: str, **environment: str) -> tuple[Config | None, str, BaseException | None]:
    seen: list[Config] = []

    @with_flags
    def command(config: Config) -> None:
        seen.append(config)

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments), env=environment)
    return (seen[0] if seen else None), done.output, done.exception


def test_defaults_are_the_dataclasss_own():
    assert run()[0] == Config()


def test_every_kind_of_field_is_read_from_its_flag():
    arguments = ["--size", "3", "--limit", "2K", "--mode", "slow", "--share", "0.25", "--wait", "250ms"]
    config, *_ = run(*arguments, "--no-cached", "--file", "a/b", "--api-key", "x")
    assert config == Config(3, 2048, "slow", 0.25, 0.25, False, Path("a/b"), api_key="x")


def test_a_repeated_flag_collects_its_values():
    assert run("--name", "Grace", "--name", "Edsger, Alan")[0].name == ("Grace", "Edsger", "Alan")
    assert run(VCLI_NAME="Grace,Edsger")[0].name == ("Grace", "Edsger")
    assert run()[0].name == ("Ada",)


def test_flag_beats_environment_beats_default():
    assert run(VCLI_SIZE="4")[0].size == 4
    assert run("--size", "5", VCLI_SIZE="4")[0].size == 5
    assert run(VCLI_CACHED="false")[0].cached is False
    assert run("--cached", VCLI_CACHED="false")[0].cached is True
    assert run(VCLI_WAIT="2min")[0].wait_s == 120


def test_sources_are_told():
    assert resolve(FLAGS["size"], "3").source == "flag"
    assert resolve(FLAGS["size"], None).source == "default"


def test_print_config_shows_values_and_sources_but_no_secrets():
    config, shown, _ = run("--print-config", "--size", "3", VCLI_MODE="slow", VCLI_API_KEY="hunter2")
    assert config is None
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert rows["size"] == ["3", "flag"]
    assert rows["mode"] == ["slow", "environment"]
    assert rows["share"] == ["0.5", "default"]
    assert rows["api_key"] == ["(hidden)", "environment"]
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--mode", "x"], {}, "--mode must be fast or slow, got 'x'"),
        ([], {"VCLI_MODE": "x"}, "VCLI_MODE must be fast or slow, got 'x'"),
        (["--size", "1.5"], {}, "--size must be a whole number such as 4096, 32k or 8GiB, got '1.5'"),
        (["--share", "x"], {}, "--share must be a number, got 'x'"),
        (["--wait", "soon"], {}, "--wait must be a time such as 30s, 500ms or 2min, got 'soon'"),
        ([], {"VCLI_CACHED": "perhaps"}, "VCLI_CACHED must be true or false, got 'perhaps'"),
        (["--size", "-1"], {}, "--size must not be negative, got -1"),
        ([], {"VCLI_SIZE": "-1"}, "VCLI_SIZE must not be negative, got -1"),
    ],
)
def test_wrong_value_names_flag_value_and_what_is_fine(arguments, environment, message):
    config, _, error = run(*arguments, **environment)
    assert config is None
    assert isinstance(error, FlagError)
    assert str(error) == message


def test_what_a_benchmark_refuses_is_said_with_the_name_that_was_used():
    @with_flags
    def command(options: BenchConfig) -> None:
        pass

    app = typer.Typer()
    app.command()(command)
    refused = CliRunner().invoke(app, [], env={"VCLI_CONCURRENCY": "4,0"}).exception
    assert str(refused) == "VCLI_CONCURRENCY must be at least 1, got 0"
    refused = CliRunner().invoke(app, ["--offline", "--batch-size", "0"]).exception
    assert str(refused) == "--batch-size must be at least 1, got 0"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("4,096", 4096),
        ("-1", -1),
        ("32k", 32_000),
        ("32K", 32_768),
        ("1.5k", 1500),
        ("8GiB", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("2g", 2 * 10**9),
        ("0.5MiB", 2**19),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_whole_numbers_carry_units(text, value):
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "8 apples", "1e3", "0x10", "--1"])
def test_other_texts_are_no_whole_numbers(text):
    with pytest.raises(ValueError, match="a whole number"):
        parse_int(text)


def test_times_carry_units():
    assert [parse_seconds(text) for text in ("30", "30s", "500ms", "2min", "1.5h")] == [30, 30, 0.5, 120, 5400]


def test_every_knob_has_its_help_and_its_own_name():
    flags = flags_of(EngineConfig) + flags_of(ServerConfig)
    assert all(flag.help for flag in flags)
    assert all(flag.variable == "VCLI_" + flag.name[2:].replace("-", "_").upper() for flag in [*flags, *BENCH_FLAGS])
    assert len({flag.name for flag in flags}) == len(flags)


@pytest.mark.parametrize(
    ("text", "values"),
    [("64", (64,)), ("1, 16,1k", (1, 16, 1000)), ("1-64x4", (1, 4, 16, 64)), ("1-4x1.5,9", (1, 2, 3, 4, 9))],
)
def test_lists_are_numbers_and_ranges_with_a_factor(text: str, values: tuple[int, ...]):
    assert parse_value(text, tuple[int, ...] | None) == values


def test_lists_hold_fractions_where_the_flag_does():
    assert parse_value("0.5-2x2,inf", tuple[float, ...] | None) == (0.5, 1.0, 2.0, float("inf"))


def test_a_range_has_an_end():
    with pytest.raises(ValueError, match="number"):
        parse_value("1-infx2", tuple[float, ...] | None)


@pytest.mark.parametrize("text", ["1,,2", "1-x2", "0-4x2", "1-64x1", "1-64", "many"])
def test_a_list_that_is_none_is_told(text: str):
    with pytest.raises(ValueError, match="number"):
        parse_value(text, tuple[int, ...] | None)


def test_named_times():
    assert parse_value("ttft=500ms, itl=30ms", dict[str, float] | None) == {"ttft": 0.5, "itl": 0.03}
    with pytest.raises(ValueError, match="ttft=500ms"):
        parse_value("ttft:500", dict[str, float] | None)
