"""The routes of the server's two listeners: clients' and, where --admin-address asks for one, the admin's.

The generating endpoints stand in generation.py; here are the small ones. The frame around all of them (API keys,
errors) is in frame.py.
"""

import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import EngineDeadError, UserError
from vcli.server import chat, docs
from vcli.server.anthropic.endpoints import Messages
from vcli.server.anthropic.protocol import CountTokensRequest
from vcli.server.bodies import ClientGoneError
from vcli.server.dashboard.files import dashboard_routes
from vcli.server.embeddings import Embeddings
from vcli.server.frame import HostCheck, KeyCheck, OriginCheck, framed, json_response, speaks_anthropic
from vcli.server.generation import ChatCompletions, Completions, engine_dead
from vcli.server.keys import Tenant
from vcli.server.metrics import CONTENT_TYPE
from vcli.server.openapi import Operation, openapi_route
from vcli.server.protocol import ApiError, DetokenizeRequest, TokenizeRequest
from vcli.server.request_log import RequestLog
from vcli.server.responses.endpoints import response_operations
from vcli.server.service import Service
from vcli.server.tracing import Tracing
from vcli.version import version


def make_app(service: Service) -> Starlette:
    """What clients see."""
    endpoints = Endpoints(service)
    operations = client_operations(service, endpoints)
    routes = [
        *operations,
        openapi_route(operations, has_keys=bool(service.keys)),
        *dashboard_routes(service.feed),
    ]
    origins = service.config.allowed_origins
    guards = [Middleware(OriginCheck, origins, service.keys), Middleware(KeyCheck, service.keys)]
    if origins:
        methods, readable = ["GET", "POST", "DELETE"], ["retry-after", "x-request-id"]
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"], expose_headers=readable
        )
        guards.insert(0, cors)
    return framed(routes, _watched(service) + guards)


def client_operations(service: Service, endpoints: "Endpoints") -> list[Operation]:
    """The API: its routes, with what docs.py says of them."""
    return [
        Operation("GET", "/v1/models", endpoints.models, docs.MODELS),
        Operation("GET", "/v1/models/{name:path}", endpoints.model, docs.MODEL),
        Operation("POST", "/v1/chat/completions", ChatCompletions(service), docs.CHAT_COMPLETIONS),
        Operation("POST", "/v1/completions", Completions(service), docs.COMPLETIONS),
        Operation("POST", "/v1/embeddings", Embeddings(service), docs.EMBEDDINGS),
        Operation("POST", "/v1/messages", Messages(service), docs.MESSAGES),
        Operation("POST", "/v1/messages/count_tokens", endpoints.count_tokens, docs.COUNT_TOKENS),
        *response_operations(service),
        Operation("POST", "/tokenize", endpoints.tokenize, docs.TOKENIZE),
        Operation("POST", "/detokenize", endpoints.detokenize, docs.DETOKENIZE),
        *_common_operations(endpoints),
    ]


def make_admin_app(service: Service) -> Starlette:
    """What operators see, on a listener of its own. A route here changes the server for everybody."""
    endpoints = Endpoints(service)
    routes = [
        Route("/admin/reload", endpoints.reload, methods=["POST"]),
        Route("/admin/restart-engine", endpoints.restart_engine, methods=["POST"]),
        *dashboard_routes(service.feed),
        *_common_operations(endpoints),
    ]
    guards = [Middleware(OriginCheck), Middleware(KeyCheck, service.keys, admin=True)]
    if not service.keys.has_admin:
        guards.insert(0, Middleware(HostCheck))
    return framed(routes, _watched(service) + guards)


def _watched(service: Service) -> list[Middleware]:
    log = [] if service.config.log_requests == "off" else [Middleware(RequestLog)]
    return log if service.traces is None else [*log, Middleware(Tracing, service.traces.tracer)]


def _common_operations(endpoints: "Endpoints") -> list[Operation]:
    return [
        Operation("GET", "/health", endpoints.health, docs.HEALTH),
        Operation("GET", "/ready", endpoints.ready, docs.READY),
        Operation("GET", "/version", endpoints.version, docs.VERSION),
        Operation("GET", "/metrics", endpoints.metrics, docs.METRICS),
    ]


Asked = TypeVar("Asked")


class Endpoints:
    """The endpoints that answer at once."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = int(time.time())

    async def models(self, request: Request) -> Response:
        entry = self._model_entry(request)
        if speaks_anthropic(request.scope):
            return json_response({"data": [entry], "has_more": False, "first_id": entry["id"], "last_id": entry["id"]})
        return json_response({"object": "list", "data": [entry]})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["name"])
        return json_response(self._model_entry(request))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt, or of a conversation by the chat template."""
        asked = await self._read(_TOKENIZE, request)
        self.service.check_model(asked.model)
        ready = self.service.require_ready()
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "send either prompt or messages", param="prompt")
        tokenizer = self.service.require_tokenizer()
        adds = asked.add_special_tokens if asked.add_special_tokens is not None else asked.messages is None
        with self._counted(request):
            text = asked.prompt if asked.prompt is not None else await self.service.render(asked)
            [prompt] = await chat.encode_texts(tokenizer, [text], ready.max_model_len, add_special_tokens=adds)
        token_ids = prompt.token_ids
        reply = {"count": len(token_ids), "max_model_len": ready.max_model_len, "tokens": token_ids}
        if asked.return_token_strs:
            reply["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
        return json_response(reply)

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(_DETOKENIZE, request)
        self.service.check_model(asked.model)
        self.service.require_ready()
        with self._counted(request):
            prompt = await chat.decode_tokens(self.service.require_tokenizer(), asked.tokens)
        return json_response({"prompt": prompt})

    async def count_tokens(self, request: Request) -> Response:
        """How long the prompt of a conversation of Anthropic's shape is."""
        asked = (await self._read(_COUNT_TOKENS, request)).chat_request()
        self.service.check_model(asked.model)
        asked.refuse_unsupported()
        ready = self.service.require_ready()
        with self._counted(request):
            text = await self.service.render(asked)
            tokenizer = self.service.require_tokenizer()
            [prompt] = await chat.encode_texts(tokenizer, [text], ready.max_model_len, add_special_tokens=False)
        return json_response({"input_tokens": len(prompt.token_ids)})

    async def reload(self, request: Request) -> Response:
        """Read --api-key-file and the certificate again: renewed ones, and without the keys that were stolen."""
        try:
            if self.service.certificate is not None:
                self.service.certificate.reload()
            self.service.keys.reload()
        except UserError as error:
            raise ApiError(400, str(error)) from None
        return json_response({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """Is the process alive, and its engine with it? A loading model is fine."""
        error = self.service.engine.error
        if error is not None:
            return json_response({"status": "dead", "error": error}, 500)
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Would a request be served now? While the model loads: what is being done, and how much of it is."""
        engine = self.service.engine
        if engine.error is not None:
            return json_response({"status": "dead", "error": engine.error}, 503)
        if self.service.admission.is_draining:
            return json_response({"status": "draining", "open_requests": self.service.admission.num_open}, 503)
        if engine.ready is None:
            stage, fraction = engine.progress
            return json_response({"status": "loading", "stage": stage, "percent": round(100 * fraction, 1)}, 503)
        if engine.is_restarting:
            stage, fraction = engine.progress
            return json_response({"status": "restarting", "stage": stage, "percent": round(100 * fraction, 1)}, 503)
        return json_response({"status": "ready"})

    async def restart_engine(self, request: Request) -> Response:
        """Put another engine in this one's place; open streams go on in it. Answers when it serves."""
        engine = self.service.engine
        self.service.require_ready()
        if engine.is_restarting:
            raise ApiError(409, "the engine is restarting already: watch /ready", code="restarting")
        num_unfinished, start = engine.num_unfinished, time.monotonic()
        try:
            await engine.restart()
        except EngineDeadError as error:
            raise engine_dead(error) from None
        took_s = round(time.monotonic() - start, 3)
        return json_response({"status": "restarted", "took_s": took_s, "unfinished_sequences": num_unfinished})

    async def version(self, request: Request) -> Response:
        return json_response({"version": version()})

    async def metrics(self, request: Request) -> Response:
        inspection = self.service.engine.inspection
        if inspection is None or inspection.fragmentation is not None:  # on a CPU it has nothing that is shown here
            await self.service.engine.inspect()
        return Response(self.service.metrics.render(), media_type=CONTENT_TYPE)

    def _counted(self, request: Request) -> AbstractContextManager[None]:
        """As one of the requests that its tenant may make."""
        tenant: Tenant = request.scope["tenant"]
        return tenant.budget.enter(1, self.service.admission.reject)

    async def _read(self, decoder: msgspec.json.Decoder[Asked], request: Request) -> Asked:
        try:
            return await self.service.bodies.read(decoder, request.scope, request.receive)
        except ClientGoneError:
            raise ApiError(400, "the body never came") from None  # nobody reads it

    def _model_entry(self, request: Request) -> dict[str, Any]:
        """The model in the shape that the client reads."""
        name, ready = self.service.model_name, self.service.engine.ready
        max_model_len = ready.max_model_len if ready else None  # not known while the model loads
        if speaks_anthropic(request.scope):
            created_at = datetime.fromtimestamp(self.started, UTC).isoformat()
            limits = {"max_input_tokens": max_model_len, "max_tokens": max_model_len}
            return {
                "id": name,
                "type": "model",
                "display_name": name,
                "created_at": created_at,
                "lifecycle": "active",
            } | limits
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "vcli",
            "root": self.service.model_root,
            "parent": None,
            "max_model_len": max_model_len,
        }


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_COUNT_TOKENS = msgspec.json.Decoder(CountTokensRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
