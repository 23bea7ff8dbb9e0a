"""Who may do what: API keys, the admin's listener, and what web pages try."""

from pathlib import Path

import httpx
import pytest

from tests.vcli.conftest import Server, StartServer, free_port

COMPLETIONS = "/v1/completions"
KEYS = """
[acme]
keys = ["acme-key-1", "acme-key-2"]

[requests]
keys = ["few-requests"]
requests_per_minute = 2

[tokens]
keys = ["few-tokens"]
tokens_per_minute = 100

[leaves]
keys = ["leaves-early"]
tokens_per_minute = 100

[narrow]
keys = ["narrow-key"]
max_open_requests = 2

[operators]
keys = ["the-admins-key"]
is_admin = true
"""


@pytest.fixture(scope="module")
def admin_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.toml"


@pytest.fixture(scope="module")
def server(start_server: StartServer, keys_file: Path, admin_port: int) -> Server:
    keys_file.write_text(KEYS)
    flags = ("--api-key-file", str(keys_file), "--admin-address", str(admin_port))
    return start_server(*flags, FAKE_STEP_S="0.01").wait_ready()


def with_key(key: str, **more: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {key}"} | more}


API = ["/v1/models", "/v1/models/x", "/v1/chat/completions", COMPLETIONS, "/tokenize", "/detokenize"]
TRICKS = ["/version", "/metrics", "/nothing", "/", "/health/", "//health", "/health/../metrics", "/metrics?x=/health"]


def test_every_path_but_the_probes_needs_a_key(server):
    with httpx.Client(base_url=server.url) as client:
        for path in API + TRICKS:
            for keys in ({}, with_key("wrong-key"), {"headers": {"authorization": "acme-key-1"}}):
                for reply in (client.get(path, **keys), client.post(path, json={"prompt": "a"}, **keys)):
                    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path


def test_probes_need_no_key(server):
    assert {server.get(path).status_code for path in ("/health", "/ready")} == {200}


@pytest.mark.parametrize("key", ["acme-key-1", "acme-key-2", "the-admins-key"])
def test_each_key_of_the_file_opens_every_route_of_clients(server, key):
    assert server.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, **with_key(key)).status_code == 200
    assert {server.get(path, **with_key(key)).status_code for path in ("/v1/models", "/metrics", "/version")} == {200}


def test_the_admins_listener_opens_to_the_admins_key_alone(server, admin_port):
    admin = Server(server.process, f"http://127.0.0.1:{admin_port}", server.log_file)
    assert admin.get("/health").status_code == 200
    assert admin.get("/metrics").status_code == 401
    assert admin.get("/metrics", **with_key("acme-key-1")).status_code == 403
    assert "vcli:num_requests_running" in admin.get("/metrics", **with_key("the-admins-key")).text
    assert admin.post(COMPLETIONS, json={"prompt": "a"}, **with_key("the-admins-key")).status_code == 404
    assert f"admin routes on {admin.url}" in server.log


def ask(server: Server, key: str, **body: object) -> httpx.Response:
    body = {"prompt": "a b c", "max_tokens": 10, "ignore_eos": True} | body
    return server.post(COMPLETIONS, json=body, **with_key(key))


def test_a_tenant_is_held_to_its_rate_of_requests(server):
    assert [ask(server, "few-requests").status_code for _ in range(2)] == [200, 200]
    tokenized = server.post("/tokenize", json={"prompt": "a"}, **with_key("few-requests"))
    for reply in (ask(server, "few-requests"), tokenized):
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit")
        assert 1 <= int(reply.headers["retry-after"]) <= 30
        assert "2 requests a minute" in reply.json()["error"]["message"]
    assert ask(server, "acme-key-1").status_code == 200, "others do not wait"


def test_a_tenant_is_held_to_its_rate_of_tokens(server):
    """90 tokens are within 100, 180 are 80 too many: 81 come in 49 seconds."""
    replies = [
        ask(server, "few-tokens", prompt=[5] * 30, max_tokens=60, stream=stream) for stream in (True, False, False)
    ]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert 45 <= int(replies[2].headers["retry-after"]) <= 49
    assert "100 tokens a minute" in replies[2].json()["error"]["message"]


def test_tokens_of_a_client_that_left_are_counted(server):
    body = {"prompt": [5] * 30, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, **with_key("leaves-early")) as reply:
        events = reply.iter_lines()
        for _ in range(2 * 75):  # with the empty lines between them
            next(events)
    server.wait_until(lambda: ask(server, "leaves-early", max_tokens=1).status_code == 429)


def test_a_tenant_has_so_many_requests_open(server):
    body = {"prompt": "a b c", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 2}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, **with_key("narrow-key")) as reply:
        events = reply.iter_lines()
        next(events)
        refused = ask(server, "narrow-key")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "2 open requests" in refused.json()["error"]["message"]
    server.wait_until(lambda: ask(server, "narrow-key").status_code == 200)
    assert ask(server, "narrow-key", n=3).status_code == 400


def test_keys_are_taken_back_while_the_server_runs(server, admin_port, keys_file):
    admin = f"http://127.0.0.1:{admin_port}/admin/reload-keys"
    keys_file.write_text(KEYS.replace("acme-key-2", "acme-key-3"))
    assert ask(server, "acme-key-2").status_code == 200, "nobody has said so yet"
    assert httpx.post(admin, **with_key("acme-key-1")).status_code == 403
    assert httpx.post(admin, **with_key("the-admins-key")).status_code == 200
    assert [ask(server, f"acme-key-{number}").status_code for number in (1, 2, 3)] == [200, 401, 200]
    keys_file.write_text("nonsense")
    assert "not understood" in httpx.post(admin, **with_key("the-admins-key")).json()["error"]["message"]
    assert ask(server, "acme-key-1").status_code == 200


def test_what_a_tenant_calls_its_salt_is_not_what_the_engine_gets(server):
    """The fake engine dies of a salt that is "die": a tenant's is never that of another, nor of nobody."""
    assert ask(server, "acme-key-1", cache_salt="die").status_code == 200


def test_web_pages_do_not_reach_an_admins_listener_without_keys(start_server):
    port = free_port()
    start_server("--admin-address", f"127.0.0.1:{port}").wait_ready()
    url = f"http://127.0.0.1:{port}/metrics"
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"host": f"localhost:{port}"}).status_code == 200
    assert httpx.get(url, headers={"host": "[::1]"}).status_code == 200
    cross_site, rebound = {"origin": "https://evil.example"}, {"host": f"evil.example:{port}"}
    assert "web pages" in httpx.get(url, headers=cross_site).json()["error"]["message"]
    assert httpx.post(url, headers=cross_site).status_code == 403
    assert "evil.example" in httpx.get(url, headers=rebound).json()["error"]["message"]


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("0.0.0.0:9999", 1, "can be reached by others, and no key is an admin's"),
        ("9999999", 2, "--admin-address must be PORT or HOST:PORT"),
        ("localhost", 2, "--admin-address must be PORT or HOST:PORT"),
    ],
)
def test_an_admins_listener_that_cannot_be_is_refused_at_the_start(start_server, address, code, words):
    server = start_server("--admin-address", address)
    assert server.process.wait(30) == code
    assert server.log.startswith("vcli: --admin-address ")
    assert words in server.log
