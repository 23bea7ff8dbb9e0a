"""Who may do what: API keys, the admin's listener, and what web pages try."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from starlette.responses import Response

from engine.errors import UserError
from tests.vcli.conftest import Server, StartServer, free_port
from vcli.server import bodies, http
from vcli.server.protocol import ApiError
from vcli.server.tls import Certificate

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
min_priority = -2
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
TRICKS = [
    "/version",
    "/metrics",
    "/nothing",
    "/dashboard",
    "/dashboard/events",
    "/health/",
    "//health",
    "/health/../metrics",
    "/metrics?x=/health",
]


def test_every_path_but_the_probes_and_the_page_needs_a_key(server):
    with httpx.Client() as client:
        for path in API + TRICKS:
            url = server.url + path
            for keys in ({}, with_key("wrong-key"), {"headers": {"authorization": "acme-key-1"}}):
                for reply in (client.get(url, **keys), client.post(url, json={"prompt": "a"}, **keys)):
                    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path


def test_probes_need_no_key(server):
    assert {server.get(path).status_code for path in ("/health", "/ready")} == {200}


@pytest.mark.parametrize("key", ["acme-key-1", "acme-key-2", "the-admins-key"])
def test_each_key_of_the_file_opens_every_route_of_clients(server, key):
    assert server.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, **with_key(key)).status_code == 200
    assert {server.get(path, **with_key(key)).status_code for path in ("/v1/models", "/version")} == {200}


def test_what_tells_of_other_tenants_is_for_admins(server):
    for path in ("/metrics", "/dashboard/events"):
        assert server.get(path, **with_key("acme-key-1")).status_code == 403
    assert server.get("/metrics", **with_key("the-admins-key")).status_code == 200


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


def test_a_tenant_does_not_push_itself_before_others(server):
    urgent = ask(server, "acme-key-1", priority=-1)
    assert (urgent.status_code, urgent.json()["error"]["param"]) == (403, "priority")
    assert [ask(server, "acme-key-1", priority=priority).status_code for priority in (0, 7)] == [200, 200]
    assert [ask(server, "narrow-key", priority=priority).status_code for priority in (-2, -3)] == [200, 403]


def test_keys_are_taken_back_while_the_server_runs(server, admin_port, keys_file):
    admin = f"http://127.0.0.1:{admin_port}/admin/reload"
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


def test_web_pages_do_not_reach_a_server_without_keys(start_server):
    port = free_port()
    server = start_server("--admin-address", f"127.0.0.1:{port}").wait_ready()
    url = f"http://127.0.0.1:{port}/metrics"
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "[::1]"):
        assert httpx.get(url, headers={"host": host}).status_code == 200
    cross_site, rebound = {"origin": "https://evil.example"}, {"host": f"evil.example:{port}"}
    for refused in (
        server.post(COMPLETIONS, json={"prompt": "a"}, headers=cross_site),
        server.post(COMPLETIONS, content='{"prompt": "a"}', headers=cross_site | {"content-type": "text/plain"}),
        httpx.get(url, headers=cross_site),
        httpx.get(url, headers=rebound),
    ):
        assert refused.status_code == 403
        assert "evil.example" in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-origin" not in server.get("/v1/models").headers


def test_pages_of_allowed_origins_use_the_server(start_server):
    flags = ("--allowed-origins", "https://chat.example", "--allowed-origins", "http://localhost:3000")
    server = start_server(*flags, VCLI_API_KEY="secret-key").wait_ready()
    page = {"origin": "https://chat.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with httpx.Client(base_url=server.url) as client:
        preflight = client.options(COMPLETIONS, headers=page | asked)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page["origin"])
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert client.options(COMPLETIONS, headers={"origin": "https://evil.example"} | asked).status_code == 400
        for key, status in (("secret-key", 200), ("wrong", 401)):
            headers = page | {"authorization": f"Bearer {key}"}
            reply = client.post(COMPLETIONS, json={"prompt": "a", "stream": True}, headers=headers)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, page["origin"])
        for other in ("https://evil.example", "null", "https://chat.example.evil.example"):
            headers = {"origin": other, "authorization": "Bearer secret-key"}
            assert client.post(COMPLETIONS, json={"prompt": "a"}, headers=headers).status_code == 403


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    certfile, keyfile = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:TRUE"]
    subprocess.run([*command, "-keyout", str(keyfile), "-out", str(certfile)], check=True, capture_output=True)
    return certfile, keyfile


def test_with_a_certificate_it_talks_https_and_takes_a_renewed_one(start_server, tmp_path):
    certfile, keyfile = make_certificate(tmp_path, "first")
    port = free_port()
    flags = ("--ssl-certfile", str(certfile), "--ssl-keyfile", str(keyfile), "--admin-address", str(port))
    server = start_server(*flags)
    url, trusted = server.url.replace("http", "https"), ssl.create_default_context(cafile=certfile)
    server.wait_until(lambda: f"admin routes on https://127.0.0.1:{port}" in server.log)
    body = {"prompt": "a b", "max_tokens": 3, "stream": True}
    assert "[DONE]" in httpx.post(url + COMPLETIONS, json=body, verify=trusted).text
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    with pytest.raises(httpx.ConnectError, match=r"self.signed"):
        httpx.get(f"{url}/health")
    renewed, its_key = make_certificate(tmp_path, "second")
    renewed.replace(certfile)
    both = ssl.create_default_context(cafile=certfile)
    both.load_verify_locations(cadata=ssl.get_server_certificate(("127.0.0.1", port)))
    refused = httpx.post(f"https://127.0.0.1:{port}/admin/reload", verify=both)
    assert (refused.status_code, "--ssl-certfile" in refused.json()["error"]["message"]) == (400, True), "a foreign key"
    its_key.replace(keyfile)
    assert httpx.post(f"https://127.0.0.1:{port}/admin/reload", verify=both).status_code == 200
    assert httpx.get(f"{url}/health", verify=ssl.create_default_context(cafile=certfile)).status_code == 200


@pytest.mark.parametrize("what", ["nothing", "text", "no key"])
def test_a_certificate_that_is_none_is_told_in_a_sentence(tmp_path, what):
    file = tmp_path / "cert.pem"
    if what == "text":
        file.write_text("hello")
    elif what == "no key":
        file.write_bytes(make_certificate(tmp_path, "whole")[0].read_bytes())
    with pytest.raises(UserError, match="no certificate with its key can be read"):
        Certificate(file, None)


def test_old_versions_of_tls_are_not_spoken(tmp_path):
    assert Certificate(*make_certificate(tmp_path, "first")).context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_an_encrypted_key_asks_nobody_for_its_password(tmp_path):
    certfile, keyfile = make_certificate(tmp_path, "first")
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "ec", "-in", str(keyfile), "-aes256", "-passout", "pass:secret", "-out", str(encrypted)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(UserError, match="encrypted"):
        Certificate(certfile, encrypted)


def test_a_head_without_end_is_cut_short(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        received = b""
        with contextlib.suppress(OSError):
            for number in range(1000):  # 2 MB
                connection.sendall(b"x-%d: " % number + b"a" * 2000 + b"\r\n")
        with contextlib.suppress(OSError):
            while part := connection.recv(4096):
                received += part
    assert number < 999 or received.startswith(b"HTTP/1.1 431")
    assert server.get("/health", headers={"x-long": "a" * 30_000}).status_code == 200


def test_a_slow_head_and_a_slow_body_are_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    """One connection each: half a head, nothing at all, half a body; and one that is slow, but not too slow."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.3)

    async def app(scope, receive, send) -> None:
        try:
            body = await bodies.read_body(scope, receive)
            await Response(body)(scope, receive, send)
        except ApiError as error:
            await Response(status_code=error.status)(scope, receive, send)

    async def said(port: int, *parts: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.05)
        answer = await reader.read()
        writer.close()
        return answer

    async def story() -> list[bytes]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            served = http.http_server(app, None)
            serving = asyncio.create_task(served.serve(sockets=[listener]))
            port, head = listener.getsockname()[1], b"POST / HTTP/1.1\r\nconnection: close\r\ncontent-length: 4\r\n"
            try:
                return await asyncio.wait_for(
                    asyncio.gather(
                        said(port, head),
                        said(port),
                        said(port, head + b"\r\nab"),
                        said(port, head, b"\r\n", b"ab", b"cd"),
                    ),
                    30,
                )
            finally:
                served.should_exit = True
                await serving

    half_head, nothing, half_body, whole = asyncio.run(story())
    assert (half_head, nothing) == (b"", b"")
    assert half_body.startswith(b"HTTP/1.1 408")
    assert whole.startswith(b"HTTP/1.1 200")
    assert whole.endswith(b"abcd")


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
