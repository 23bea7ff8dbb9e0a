"""What a result tells of the machine and of the command."""

import sys

import pytest

from bench.environment import command_line


@pytest.mark.parametrize(
    "given", [["--api-key", "s3cret"], ["--api-key=s3cret"], ["--api-key=s3\ncret", "--api-key", "s3"]]
)
def test_the_command_can_be_typed_again_and_holds_no_key(monkeypatch, given: list[str]):
    monkeypatch.setattr(sys, "argv", ["/any/where/vcli/__main__.py", "bench", "--url", "http://host", *given, "a b"])

    shown = command_line()

    assert shown.startswith("python -m vcli bench --url http://host --api-key")
    assert shown.endswith("HIDDEN 'a b'")
    assert "s3" not in shown
    assert "cret" not in shown
