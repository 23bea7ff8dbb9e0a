"""The server's routes, and the shape of everything that goes wrong.

The generating endpoints stand in generation.py; here are the small ones and the frame around all of them. What always
holds: every reply with an error is OpenAI's `{"error": {...}}`, whatever failed and wherever.
"""

import hmac
import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vcli.server import chat
from vcli.server.generation import ChatCompletions, ClientGoneError, Completions, Service, read_body
from vcli.server.metrics import CONTENT_TYPE
from vcli.server.protocol import ApiError, DetokenizeRequest, TokenizeRequest, decode
from vcli.version import version

PUBLIC_PATHS = ("/health", "/ready", "/version", "/metrics")  # need no API key: probes and scrapers have none


def make_app(service: Service) -> Starlette:
    """The ASGI application of one server."""
    endpoints = Endpoints(service)
    routes = [
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/health", endpoints.health),
        Route("/ready", endpoints.ready),
        Route("/version", endpoints.version),
        Route("/metrics", endpoints.metrics),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(ApiKeyCheck, service.config.api_key)] if service.config.api_key else [],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_failure},
    )


class Endpoints:
    """The endpoints that answer at once."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = int(time.time())

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["name"])
        return _json(self._model_entry())

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt, or of a conversation by the chat template."""
        asked = decode(_TOKENIZE, await _body(request))
        self.service.check_model(asked.model)
        ready = self.service.require_ready()
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "send either prompt or messages", param="prompt")
        text = asked.prompt if asked.prompt is not None else await self.service.render(asked)
        tokenizer = self.service.require_tokenizer()
        adds = asked.add_special_tokens if asked.add_special_tokens is not None else asked.messages is None
        [prompt] = await chat.encode_texts(tokenizer, [text], ready.max_model_len, add_special_tokens=adds)
        token_ids = prompt.token_ids
        reply = {"count": len(token_ids), "max_model_len": ready.max_model_len, "tokens": token_ids}
        if asked.return_token_strs:
            reply["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
        return _json(reply)

    async def detokenize(self, request: Request) -> Response:
        asked = decode(_DETOKENIZE, await _body(request))
        self.service.check_model(asked.model)
        self.service.require_ready()
        return _json({"prompt": await chat.decode_tokens(self.service.require_tokenizer(), asked.tokens)})

    async def health(self, request: Request) -> Response:
        """Is the process alive, and its engine with it? A loading model is fine."""
        error = self.service.engine.error
        return _json({"status": "ok"}) if error is None else _json({"status": "dead", "error": error}, 500)

    async def ready(self, request: Request) -> Response:
        """Would a request be served now? While the model loads: what is being done, and how much of it is."""
        engine = self.service.engine
        if engine.error is not None:
            return _json({"status": "dead", "error": engine.error}, 503)
        if self.service.admission.is_draining:
            return _json({"status": "draining", "open_requests": self.service.admission.num_open}, 503)
        if engine.ready is None:
            stage, fraction = engine.progress
            return _json({"status": "loading", "stage": stage, "percent": round(100 * fraction, 1)}, 503)
        if engine.is_restarting:
            stage, fraction = engine.progress
            return _json({"status": "restarting", "stage": stage, "percent": round(100 * fraction, 1)}, 503)
        return _json({"status": "ready"})

    async def version(self, request: Request) -> Response:
        return _json({"version": version()})

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.render(), media_type=CONTENT_TYPE)

    def _model_entry(self) -> dict[str, Any]:
        ready = self.service.engine.ready
        return {
            "id": self.service.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "vcli",
            "root": self.service.model_root,
            "parent": None,
            "max_model_len": ready.max_model_len if ready else None,  # not known while the model loads
        }


class ApiKeyCheck:
    """Lets nobody past without the key, except to the public paths."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self.expected):
                message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                return await _error(ApiError(401, message, code="invalid_api_key"))(scope, receive, send)
        return await self.app(scope, receive, send)


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def _body(request: Request) -> bytes:
    try:
        return await read_body(request.scope, request.receive)
    except ClientGoneError:
        return b"{}"  # whatever it is answered, nobody reads it


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    messages = {404: f"{what}: there is nothing here", 405: f"{what}: this path takes another method"}
    response = _error(ApiError(error.status_code, messages.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log gets the traceback (from the framework), the client gets no details."""
    return _error(ApiError(500, "the server failed on this request: its log says why"))


def _error(error: ApiError) -> Response:
    return Response(error.body(), error.status, headers=error.headers, media_type="application/json")


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
