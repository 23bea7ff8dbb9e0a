"""Who may do what: API keys, the admin's listener, and what web pages try."""

import httpx
import pytest

from tests.vcli.conftest import Server, StartServer, free_port

COMPLETIONS = "/v1/completions"
KEYS = """
[acme]
keys = ["acme-key-1", "acme-key-2"]

[operators]
keys = ["the-admins-key"]
is_admin = true
"""


@pytest.fixture(scope="module")
def admin_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory, admin_port: int) -> Server:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(KEYS)
    return start_server("--api-key-file", str(file), "--admin-address", str(admin_port)).wait_ready()


def with_key(key: str, **more: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {key}"} | more}


API = ["/v1/models", "/v1/models/x", "/v1/chat/completions", COMPLETIONS, "/tokenize", "/detokenize"]
TRICKS = ["/version", "/metrics", "/nothing", "/", "/health/", "//health", "/health/../metrics", "/metrics?x=/health"]


@pytest.mark.parametrize("path", API + TRICKS)
def test_every_path_but_the_probes_needs_a_key(server, path):
    for keys in ({}, with_key("wrong-key"), {"headers": {"authorization": "acme-key-1"}}):
        for reply in (server.get(path, **keys), server.post(path, json={"prompt": "a"}, **keys)):
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


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
