"""What the server's log says of requests, and what it never says."""

import json

import httpx

from tests.vcli.conftest import Server, StartServer

SECRET = "xyzzy"
HELLO = [{"role": "user", "content": f"{SECRET} hello"}]


def tell_secrets(server: Server) -> None:
    """Everything that can go right or wrong with a request that holds the secret."""
    prompt = f"{SECRET} a b"
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for body in (
            {"prompt": prompt, "max_tokens": 12, "ignore_eos": True},
            {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "stream": True, "echo": True},
            {"prompt": prompt, "temperature": SECRET},
            {"prompt": prompt, "logit_bias": {SECRET: 1}},
            {"prompt": prompt * 1000},
            {"prompt": prompt, "stop": [SECRET]},
            {"prompt": prompt, "model": SECRET},
        ):
            client.post("/v1/completions", json=body)
        client.post("/v1/completions", content=f'{{"prompt": "{SECRET}')
        for more in ({}, {"chat_template": SECRET}, {"chat_template_kwargs": {"raise_exception": SECRET}}):
            client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3} | more)
        tokens = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        client.post("/detokenize", json={"tokens": tokens})
        # Last, a request that ends every engine which gets it.
        client.post("/v1/completions", json={"prompt": prompt, "cache_salt": "die", "user": SECRET})


def lines_of(server: Server) -> list[dict]:
    return [json.loads(line.partition(": ")[2]) for line in server.log.splitlines() if " vcli.requests: " in line]


def test_no_text_of_a_prompt_or_an_answer_is_in_the_log(start_server: StartServer):
    server = start_server("--log-requests", "lines").wait_ready()
    tell_secrets(server)
    assert "the engine starts again" in server.log
    assert len(lines_of(server)) > 10
    assert SECRET not in server.log


def test_lines_say_what_a_request_was_like(start_server: StartServer, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[acme]\nkeys = ["acme-key-1"]')
    server = start_server("--log-requests", "text", "--api-key-file", str(keys)).wait_ready()
    key = {"authorization": "Bearer acme-key-1"}
    body = {"prompt": "a\nb", "max_tokens": 4, "ignore_eos": True, "n": 2}
    for stream in (False, True):
        reply = server.post("/v1/completions", json=body | {"stream": stream}, headers=key)
        request_id = reply.headers["x-request-id"]
        server.wait_until(lambda request_id=request_id: request_id in server.log)
        [line] = [line for line in lines_of(server) if line.get("id") == request_id]
        assert line.pop("seconds") > 0
        answers = line.pop("answers")
        assert len(answers) == 2
        assert stream or answers == [choice["text"] for choice in reply.json()["choices"]]
        assert line | {"prompt_tokens": 0, "cached_tokens": 0} == {
            "method": "POST",
            "path": "/v1/completions",
            "status": 200,
            "tenant": "acme",
            "id": request_id,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "output_tokens": 8,
            "finish_reasons": ["length", "length"],
            "prompts": ["a\nb"],
        }
    server.get("/v1/models%0A2026 INFO forged")
    server.wait_until(lambda: "forged" in server.log)
    assert lines_of(server)[-1]["path"] == "/v1/models\n2026 INFO forged"
    assert lines_of(server)[-1]["status"] == 401
