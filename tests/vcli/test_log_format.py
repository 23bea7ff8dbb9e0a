"""With --log-format json the log is one object a line, whoever writes, and whatever goes wrong."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from tests.vcli.conftest import ROOT, StartServer

JSON = ("--log-format", "json")
ALWAYS = {"time", "level", "process", "logger", "message"}


def entries(log: str) -> list[dict]:
    lines = [json.loads(line) for line in log.splitlines()]
    assert all(line.keys() >= ALWAYS for line in lines)
    assert all(isinstance(value, str) for line in lines for name, value in line.items() if name in ALWAYS)
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert all(timedelta() <= datetime.now(UTC) - each < timedelta(minutes=5) for each in times)
    return lines


def test_every_line_of_a_server_is_an_object_and_the_last_one_is_the_cause_of_its_end(start_server: StartServer):
    server = start_server(*JSON, "--log-requests", "lines", "--max-restarts", "0").wait_ready()
    body = {"prompt": "a b", "max_tokens": 4, "ignore_eos": True}
    request_id = server.post("/v1/completions", json=body).headers["x-request-id"]
    assert server.post("/v1/completions", json=body | {"cache_salt": "mutter"}).status_code == 500
    assert server.process.wait(20) == 1
    lines = entries(server.log)
    assert any(line["message"].startswith("ready in ") for line in lines)
    [line] = [line for line in lines if line.get("request", {}).get("id") == request_id]
    assert (line["logger"], line["message"], line["level"]) == ("vcli.requests", "request", "info")
    assert line["request"]["path"] == "/v1/completions"
    assert line["request"]["output_tokens"] == 4
    said = [(each["level"], each["message"]) for each in lines if each["process"] == "engine"]
    assert said == [("warning", "terminate called"), ("warning", "after \N{REPLACEMENT CHARACTER} throwing")]
    assert (lines[-1]["level"], lines[-1]["process"]) == ("critical", "api")
    assert lines[-1]["message"].startswith("the engine process ended with exit code 7")


DIVISION = "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "print('vcli: a', file=sys.stderr); sys.stderr.write('b'); sys.stderr.write(' c\\n\\n')",
            ["info a", "info b c"],
        ),
        ("logging.getLogger('x').warning('%s\\n%s', 1, 2)", ["warning 1\n2"]),
        ("warnings.warn_explicit('odd', UserWarning, 'a.py', 3)", ["warning a.py:3: UserWarning: odd"]),
        ("print('\\udc80', file=sys.stderr)", ["info ?"]),
        ("1 / 0", [f"critical the process ends: {DIVISION}"]),
        ("threading.Thread(target=lambda: 1 / 0).start()", [f"error a thread ends: {DIVISION}"]),
        ("from vcli.console import console; console.print('[bold]wide[/] ' * 40)", ["info " + "wide " * 39 + "wide"]),
    ],
)
def test_whatever_python_writes_to_stderr_is_an_object(code: str, said: list[str]):
    program = f"import logging, sys, threading, warnings\nfrom engine import log\nlog.set_up('engine', 'json')\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    lines = entries(done.stderr)
    causes = [": " + line["exception"].splitlines()[-1] if "exception" in line else "" for line in lines]
    assert [f"{line['level']} {line['message']}{cause}" for line, cause in zip(lines, causes, strict=True)] == said
