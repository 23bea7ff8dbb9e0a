"""Traces of requests, for the OpenTelemetry collector that --otlp-endpoint names.

A request is a span of HTTP, which takes up the trace of its caller (W3C's traceparent); in it there is one for each
prompt, described as OpenTelemetry's conventions for generative AI have it, and in that its time in the queue, in
prefill and in decode. What always holds: no text of a prompt or an answer is in a trace, and a collector that is slow
or gone costs requests nothing: what it does not take is dropped.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import UserError
from engine.outputs import RequestTimings
from engine.request_stream import RequestStream
from engine.sampling_params import SamplingParams
from vcli.version import version

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

PATHS = "/v1/"  # what stands elsewhere is for probes, scrapers and people
OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}  # all others: chat
SEND_INTERVAL_S = 0.5
MAX_SPANS = 10_000  # that wait for the collector, about 20 MB
LAST_WORDS_S = 1.0  # for what is left to reach the collector at the end

log = logging.getLogger("vcli")


class Traces:
    """Owns the way to the collector. OpenTelemetry's own variables do the rest: headers, service name, sampling."""

    def __init__(self, endpoint: str) -> None:
        """Raises UserError where OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError as error:
            missing = f"--otlp-endpoint needs {error.name}, which is not there"
            raise UserError(f"{missing}: pip install 'vcli[otlp]'") from None
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        service = Resource({"service.name": "vcli", "service.version": version()})
        resource = service.merge(OTELResourceDetector().detect())
        self._outbox = _Outbox(OTLPSpanExporter(endpoint))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(self._outbox)  # type: ignore[arg-type]
        self.tracer: Tracer = provider.get_tracer("vcli", version())

    def close(self) -> None:
        """Send what is left, if the collector takes it in time."""
        self._outbox.shutdown()


class _Outbox:
    """A span processor that sends what has ended twice a second, from a thread of its own.

    OpenTelemetry's own starts such a thread in every forked child, too; under uvloop the child hangs there, and never
    becomes the program that it is to be.
    """

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self._spans: deque[ReadableSpan] = deque(maxlen=MAX_SPANS)  # the oldest of too many are dropped
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def on_start(self, span: "ReadableSpan", parent_context: "Context | None" = None) -> None:
        """Nothing is told of a span before its end."""

    def _on_ending(self, span: "ReadableSpan") -> None:
        """The same, a moment before it."""

    def on_end(self, span: "ReadableSpan") -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._spans.append(span)

    def shutdown(self) -> None:
        self._ends.set()
        self._thread.join(LAST_WORDS_S)
        self._exporter.shutdown()  # which ends an attempt that is under way

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return not self._spans

    def _run(self) -> None:
        while not self._ends.wait(SEND_INTERVAL_S):
            self._send()
        self._send()

    def _send(self) -> None:
        if spans := [self._spans.popleft() for _ in range(len(self._spans))]:
            try:
                self._exporter.export(spans)
            except Exception:  # the thread goes on: there may be better times
                log.exception("%d spans cannot be sent", len(spans))


class Tracing:
    """Makes the span of HTTP, and leaves in `scope["trace"]` what `trace_generation` needs for those of its prompts."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self.tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PATHS):
            return await self.app(scope, receive, send)
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = self.tracer.start_span(
            scope["method"],
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {"http.request.method": scope["method"], "url.path": scope["path"], "url.scheme": scope["scheme"]},
        )
        scope["trace"] = self.tracer, set_span_in_context(span)
        if "log" in scope:
            scope["log"]["trace_id"] = f"{span.get_span_context().trace_id:032x}"

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            if "endpoint" in scope:  # it is a path that we have
                route = scope["path"]
                for name, value in scope["path_params"].items():
                    route = route.replace(str(value), f"{{{name}}}") if value else route
                span.set_attribute("http.route", route)
                span.update_name(f"{scope['method']} {route}")
            if (tenant := scope.get("tenant")) and tenant.name:
                span.set_attribute("vcli.tenant", tenant.name)
            span.end()


def trace_generation(
    scope: Scope, model_name: str, request_id: str, params: SamplingParams, streams: Sequence[RequestStream]
) -> None:
    """A span for each prompt of a call that has ended, and in it one for each part of its time."""
    if "trace" not in scope:
        return
    from opentelemetry.trace import StatusCode, set_span_in_context

    tracer, context = scope["trace"]
    operation = OPERATIONS.get(scope["path"], "chat")
    asked = _asked(params) if operation != "embeddings" else {}
    now, since_epoch_s = time.monotonic(), time.time() - time.monotonic()

    def nanoseconds(moment: float) -> int:
        return int((moment + since_epoch_s) * 1e9)

    for stream in streams:
        timings = stream.state.timings
        end = timings.last_token_time or now
        span = tracer.start_span(
            f"{operation} {model_name}", context, start_time=nanoseconds(timings.arrival_time), attributes=asked
        )
        span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "vcli",
                "gen_ai.request.model": model_name,
                "gen_ai.response.model": model_name,
                "gen_ai.response.id": request_id,
                "gen_ai.response.finish_reasons": timings.finish_reasons,
                "gen_ai.usage.input_tokens": timings.num_prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": timings.num_cached_tokens,
                "gen_ai.usage.output_tokens": timings.num_output_tokens,
            }
        )
        if timings.first_token_time:
            waited_s = timings.first_token_time - timings.arrival_time
            span.set_attribute("gen_ai.response.time_to_first_chunk", waited_s)
        if len(timings.finish_reasons) < len(stream.state.sequences) or "error" in timings.finish_reasons:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for name, begin, stop in _phases(timings, end):
            tracer.start_span(name, inside, start_time=nanoseconds(begin)).end(nanoseconds(stop))
        span.end(nanoseconds(end))


def _asked(params: SamplingParams) -> dict[str, int | float]:
    """What a client may have asked for, by the conventions' names."""
    asked = {
        "choice.count": params.n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "seed": params.seed,
    }
    return {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}


def _phases(timings: RequestTimings, end: float) -> list[tuple[str, float, float]]:
    """The parts of a request's time that are known, with their begin and end; without tokens it is all prefill."""
    if not timings.scheduled_time:
        return []
    first = timings.first_token_time or end
    parts = [("queue", timings.arrival_time, timings.scheduled_time), ("prefill", timings.scheduled_time, first)]
    return [*parts, ("decode", first, end)] if timings.first_token_time else parts
