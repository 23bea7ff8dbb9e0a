"""What an OpenTelemetry collector gets of requests, by its own protocol."""

import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.vcli.conftest import ROOT, Server, StartServer

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "xyzzy"
STEP_S = 0.01


class Collector:
    """Takes what is sent to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def trace(self, trace_id: str, num_spans: int) -> dict[str, Span]:
        """The spans of a trace by name, when so many are there."""
        deadline = time.monotonic() + 20
        while True:
            found = [span for span in self.spans if span.trace_id.hex() == trace_id]
            if len(found) >= num_spans:
                assert len(found) == num_spans, [span.name for span in found]
                return {span.name: span for span in found}
            assert time.monotonic() < deadline, [span.name for span in found]
            time.sleep(0.02)


def attributes(holder: object) -> dict[str, object]:
    """Their values, in lists where they are several."""

    def plain(value: object) -> object:
        kind = value.WhichOneof("value")  # type: ignore[attr-defined]
        held = getattr(value, kind)
        return [plain(each) for each in held.values] if kind == "array_value" else held

    return {each.key: plain(each.value) for each in holder.attributes}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.http.shutdown()
    collector.http.server_close()


@pytest.fixture(scope="module")
def server(start_server: StartServer, collector: Collector) -> Server:
    flags = ("--otlp-endpoint", collector.url, "--log-requests", "lines", "--served-model-name", "fake")
    return start_server(*flags, FAKE_STEP_S=str(STEP_S)).wait_ready()


def ask(server: Server, path: str, trace_id: str = TRACE, flags: str = "01", **body: object) -> httpx.Response:
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-{flags}"}
    return server.post(path, json={"max_tokens": 8, "ignore_eos": True} | body, headers=headers)


def test_a_requests_time_is_told_within_the_trace_of_its_caller(server: Server, collector: Collector):
    messages = [{"role": "user", "content": f"{SECRET} a b"}]
    reply = ask(server, "/v1/chat/completions", messages=messages, temperature=0.5, n=2)
    spans = collector.trace(TRACE, 5)
    http, chat = spans["POST /v1/chat/completions"], spans["chat fake"]
    assert http.parent_span_id.hex() == CALLER
    assert chat.parent_span_id == http.span_id
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {part.parent_span_id for part in parts} == {chat.span_id}
    moments = [moment for part in parts for moment in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert moments == sorted(moments), "one after the other"
    assert [(a, b) for a, b in zip(moments[1:-1:2], moments[2:-1:2], strict=True) if a != b] == [], "without gaps"
    assert (moments[0], moments[-1]) == (chat.start_time_unix_nano, chat.end_time_unix_nano)
    assert http.start_time_unix_nano <= moments[0] < moments[-1] <= http.end_time_unix_nano
    assert moments[-1] - moments[-2] >= 6 * STEP_S * 1e9, "seven steps after the first token"
    usage = reply.json()["usage"]
    told = attributes(chat)
    assert told.pop("gen_ai.response.time_to_first_chunk") == pytest.approx((moments[3] - moments[0]) / 1e9, abs=1e-3)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vcli",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": reply.json()["id"],
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.usage.output_tokens": 16,
    }
    assert attributes(http) == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert collector.services == {"vcli"}
    assert not any(SECRET.encode() in body for body in collector.bodies)
    [line] = [line for line in server.log.splitlines() if TRACE in line]
    assert json.loads(line.partition(": ")[2])["id"] == reply.json()["id"], "the log names the trace"


def test_every_prompt_of_a_call_has_its_span(server: Server, collector: Collector):
    trace_id = "1" * 32
    ask(server, "/v1/completions", trace_id, prompt=[[5], [6, 7]])
    collector.trace(trace_id, 1 + 2 * 4)
    spans = [span for span in collector.spans if span.trace_id.hex() == trace_id and "text_completion" in span.name]
    assert [attributes(span)["gen_ai.usage.input_tokens"] for span in spans] == [1, 2]


def test_a_client_that_left_and_a_request_that_was_refused_are_told_as_such(server: Server, collector: Collector):
    trace_id = "2" * 32
    headers, body = {"traceparent": f"00-{trace_id}-{CALLER}-01"}, {"prompt": [5], "max_tokens": 400, "stream": True}
    url = server.url + "/v1/completions"
    with httpx.stream("POST", url, json=body | {"ignore_eos": True}, headers=headers) as stream:
        next(stream.iter_lines())
    left = collector.trace(trace_id, 5)["text_completion fake"]
    assert attributes(left)["gen_ai.response.finish_reasons"] == ["abort"]
    ask(server, "/v1/models/some/model", "3" * 32)
    refused = collector.trace("3" * 32, 1)["POST /v1/models/{name}"]
    assert attributes(refused)["http.response.status_code"] == 405


def test_a_request_that_fails_is_told_even_if_the_server_ends_with_it(start_server: StartServer, collector: Collector):
    flags = ("--otlp-endpoint", collector.url, "--served-model-name", "fake", "--max-restarts", "0")
    server = start_server(*flags).wait_ready()
    assert ask(server, "/v1/completions", "4" * 32, prompt=[5], cache_salt="die").status_code == 500
    assert server.process.wait(20) == 1
    spans = collector.trace("4" * 32, 2)
    assert {span.status.code for span in spans.values()} == {Status.STATUS_CODE_ERROR}
    assert spans.keys() == {"POST /v1/completions", "text_completion fake"}


def test_what_the_caller_does_not_sample_and_probes_leave_no_trace(server: Server, collector: Collector):
    before = len(collector.spans)
    assert ask(server, "/v1/completions", "5" * 32, flags="00", prompt=[5]).status_code == 200
    server.get("/health"), server.get("/metrics")
    assert server.get("/v1/models", headers={"traceparent": "00-nonsense"}).status_code == 200
    deadline = time.monotonic() + 20
    while len(collector.spans) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [span.name for span in collector.spans[before:]] == ["GET /v1/models"]


def test_a_collector_that_is_gone_costs_nothing_but_its_traces(start_server: StartServer):
    server = start_server("--otlp-endpoint", "http://127.0.0.1:9/").wait_ready()
    assert ask(server, "/v1/completions", prompt=[5]).status_code == 200
    assert server.end() == 0


def test_without_opentelemetry_the_flag_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['opentelemetry.sdk.trace'] = None; from vcli.cli import main; main()"
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", code, "serve", str(tmp_path), "--otlp-endpoint", "http://localhost:4318"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "vcli: --otlp-endpoint needs opentelemetry.sdk.trace, which is not there: pip install"
    )
