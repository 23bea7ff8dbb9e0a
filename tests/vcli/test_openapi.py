"""The server against its own description: schemathesis sends what it allows and what it forbids."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from starlette.routing import Route

from vcli.server.app import make_app
from vcli.server.config import ServerConfig
from vcli.server.dashboard.files import FEED_PATH, PATHS
from vcli.server.keys import Keys
from vcli.server.openapi import Operation

ROOT = Path(__file__).resolve().parents[2]
KEY = "open-sesame"


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--api-key", KEY, FAKE_STEP_S="0.0005").wait_ready()


def test_every_route_is_described():
    app = make_app(SimpleNamespace(config=ServerConfig(), keys=Keys({}), feed=None, traces=None))
    others = {route.path for route in app.routes if isinstance(route, Route) and not isinstance(route, Operation)}
    assert others == {*PATHS, FEED_PATH}, "the page, and what it reads"


def test_the_description_needs_no_key_and_names_its_kinds(server):
    description = server.get("/openapi.json").json()
    assert description["components"]["securitySchemes"].keys() == {"bearer", "header"}
    assert description["paths"]["/health"]["get"]["security"] == []
    assert "security" not in description["paths"]["/v1/completions"]["post"]
    responses = description["paths"]["/v1/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "404", "408", "413", "422", "429", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}


def test_refusals_that_no_body_brings_about_have_the_shape_that_is_told(start_server, tmp_path):
    (tmp_path / "keys.toml").write_text('[small]\nkeys = ["small-key"]\nrequests_per_minute = 1\n')
    server = start_server("--api-key-file", str(tmp_path / "keys.toml"), FAKE_LOAD_S="1").wait_http()
    key, path, body = {"Authorization": "Bearer small-key"}, "/v1/completions", {"prompt": "a"}
    replies = [(path, server.post(path, json=body, headers=key), 503)]
    server.wait_ready()
    replies += [
        (path, server.post(path, json=body), 401),
        (path, server.post(path, json=body, headers=key | {"Origin": "https://evil.example"}), 403),
        (path, server.post(path, json=body | {"model": "another"}, headers=key), 404),
        (path, server.post(path, content=b" " * (5 << 20), headers=key), 413),
        (path, server.post(path, json=body, headers=key), 200),
        (path, server.post(path, json=body, headers=key), 429),
        ("/v1/messages", server.post("/v1/messages", json={}), 401),
        ("/metrics", server.get("/metrics", headers=key), 403),
    ]
    description = server.get("/openapi.json").json()
    for asked, reply, status in replies:
        [operation] = description["paths"][asked].values()
        schema = operation["responses"][str(reply.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(reply.json(), schema | {"components": description["components"]})
        assert reply.status_code == status, reply.text


def test_no_request_makes_the_server_break_its_word(server, pytestconfig: pytest.Config, tmp_path):
    """No 5xx and no undocumented status or shape, of events too; what is wrong is refused, and what is right served."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    command += [
        "--header",
        f"Authorization: Bearer {KEY}",
        "--seed",
        "1",
        "--phases",
        "examples,coverage,fuzzing,stateful",
    ]
    command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]  # our own one is stricter
    command += ["--max-examples", str(pytestconfig.getoption("--schemathesis-examples"))]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.vcli.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=os.environ | hooks, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-10_000:] + ended.stderr[-2000:]
    assert "Traceback" not in server.log
