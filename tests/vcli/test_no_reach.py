"""What a request says is data: it makes the server read no file, call no address, start and unpickle nothing."""

import ast
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from engine import messages
from tests.vcli.conftest import ROOT, StartServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
UNPICKLERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "pandas.read_pickle",
}
UNPICKLERS |= {"torch.load", "torch.jit.load", "numpy.load", "np.load", "multiprocessing", "concurrent.futures.process"}
# Starts its own children with it, and hands them what it made itself; what a server said comes back as msgpack.
SPAWNS = {"bench/client_processes.py": {"multiprocessing"}}


def hostile_requests(file: Path, url: str) -> Iterator[tuple[str, str, dict | None]]:
    """Every place where a path, an address or a program could be put; with what the first and last of them mean."""
    path = str(file)
    programs = [
        "{% include 'X' %}",
        "{% import 'X' as x %}",
        "{{ cycler.__init__.__globals__.os.popen('cat X').read() }}",
    ]
    programs += ["{{ self.__init__.__globals__.__builtins__.open('X').read() }}", "{% extends 'X' %}"]
    for target in (path, f"file://{path}", url, f"{url}/config.json", "../" * 20 + path.lstrip("/")):
        text = {"role": "user", "content": target}
        for kind in ("image_url", "input_audio", "video_url", "file"):
            part = {"type": kind, kind: {"url": target, "data": target, "file_id": target}}
            yield "POST", CHAT, {"messages": [{"role": "user", "content": [part]}]}
        for name in ("chat_template", "tools", "functions", "audio", "response_format", "structured_outputs"):
            yield "POST", CHAT, {"messages": [text], name: target}
            yield "POST", CHAT, {"messages": [text], name: [{"type": "json_schema", "$ref": target, "url": target}]}
        for name in ("documents", "tokenizer", "path", "loader", "environment"):
            yield "POST", CHAT, {"messages": [text], "chat_template_kwargs": {name: target}, "max_tokens": 1}
        for name in ("prompt_embeds", "suffix", "user", "cache_salt", "guided_grammar", "lora_path", "model", "stop"):
            yield "POST", COMPLETIONS, {"prompt": target, "max_tokens": 1, name: target}
        for program in programs:
            content = program.replace("X", target)
            yield "POST", CHAT, {"messages": [{"role": "user", "content": content, "name": content}], "max_tokens": 1}
            yield "POST", CHAT, {"messages": [text], "chat_template": content}
        yield "POST", "/tokenize", {"prompt": target, "model": target}
        yield "GET", f"/v1/models/{target}", None
        yield "GET", f"/{target}", None
        yield "GET", f"/%2e%2e/%2e%2e{path}", None


def test_nothing_is_read_called_or_started_because_of_a_request(start_server: StartServer, tmp_path):
    audit, secret = tmp_path / "audit", tmp_path / "secret.txt"
    secret.write_text("swordfish")
    server = start_server(FAKE_AUDIT=str(audit)).wait_ready()
    hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    with socket.create_server(("127.0.0.1", 0)) as tripwire, httpx.Client(base_url=server.url) as client:
        url = f"http://127.0.0.1:{tripwire.getsockname()[1]}"
        for _ in range(2):  # what is loaded when it is first used is loaded now
            for body in (hello, hello | {"stream": True}, hello | {"tools": ["x"]}, hello | {"chat_template": "x"}):
                client.post(CHAT, json=body)
            for body in ({"prompt": "a"}, {"prompt": 1}, {"prompt": "a", "model": "x"}, {"prompt": "a", "n": 2}):
                client.post(COMPLETIONS, json=body)
            client.post("/tokenize", json={"prompt": "a"})
            client.get("/nothing")
        server.wait_until(lambda: "'standby'" in audit.read_text())  # the engine that may be the next has been started
        before = len(audit.read_text())
        statuses = set()
        for method, path, body in hostile_requests(secret, url):
            reply = client.request(method, path, json=body)
            statuses.add(reply.status_code)
            assert "swordfish" not in reply.text
        assert statuses <= {200, 400, 404}
        assert audit.read_text()[before:] == ""
        tripwire.setblocking(False)
        try:
            caller = tripwire.accept()
        except BlockingIOError:
            caller = None
        assert caller is None, "nobody has called"
    assert "Traceback" not in server.log


def test_nothing_in_this_repository_can_unpickle():
    found: dict[str, set[str]] = {}
    for folder in ("vcli", "engine", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            if used := uses(ast.parse(file.read_text())) & UNPICKLERS:
                found[str(file.relative_to(ROOT))] = used
    assert found == SPAWNS


def test_the_search_for_picklers_finds_them():
    source = "import pickle as p\nfrom torch import load\nnp.load(file, allow_pickle=True)\nimport joblib.parallel"
    assert uses(ast.parse(source)) >= {"pickle", "np.load", "torch.load", "joblib"}


def uses(tree: ast.AST) -> set[str]:
    """Modules and functions that are imported or named, each also without its last and with its first part alone."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names | {name.rpartition(".")[0] for name in names} | {name.partition(".")[0] for name in names}


def test_messages_between_processes_are_typed():
    """A frame that is anything else is refused before it means anything."""
    for frame in (
        b"\x80\x04\x95",
        b"cos\nsystem\n(S'true'\ntR.",
        json.dumps({"type": "Shutdown"}).encode(),
        b"\xc1",
        b"",
    ):
        for decode in (messages.decode_to_engine, messages.decode_from_engine):
            with pytest.raises(msgspec.MsgspecError):
                decode(frame)
