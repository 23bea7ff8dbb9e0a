"""What all of `python -m bench.NAME` have in common."""

import json
from pathlib import Path

import pytest

from bench import command
from engine.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "limit", "served"),
    [
        ([], 1, []),
        (["folder", "--limit", "2"], 2, ["folder"]),
        (["--limit", "2", "--", "--device", "cpu", "--"], 2, ["--device", "cpu", "--"]),
        (["folder", "--", "--limit", "3"], 1, ["folder", "--limit", "3"]),
    ],
)
def test_what_follows_two_dashes_is_the_servers(arguments, limit, served):
    parser = command.parser("test", "What it is for.\nAnd more.")
    parser.add_argument("--limit", type=int, default=1)
    options, rest = command.parse(parser, arguments)
    assert (options.limit, rest) == (limit, served)
    assert "What it is for." in parser.format_help()
    assert "And more." not in parser.format_help()


@pytest.mark.parametrize(("is_fine", "code"), [(True, 0), (False, 3), (None, 4)])
def test_a_result_is_written_with_the_machine_whatever_it_says(tmp_path: Path, is_fine, code):
    output = tmp_path / "new" / "result.json"
    assert command.run("test", output, lambda: ({"rows": ["é"]}, is_fine)) == code
    result = json.loads(output.read_text())
    assert (result["kind"], result["rows"]) == ("test", ["é"])
    assert result["environment"]["cpu_count"] > 0


def test_a_file_of_another_kind_is_refused_before_anything_is_measured(tmp_path: Path, capsys):
    assert command.run("test", tmp_path / "result.html", lambda: pytest.fail("it measures")) == 1
    assert capsys.readouterr().err.startswith("bench.test: --output ")


def test_a_mistake_of_the_person_is_one_sentence_and_no_file(tmp_path: Path, capsys):
    def measure() -> tuple[dict, bool]:
        raise UserError("there is no such model")

    assert command.run("test", tmp_path / "result.json", measure) == 1
    assert capsys.readouterr().err == "bench.test: there is no such model\n"
    assert not list(tmp_path.iterdir())
