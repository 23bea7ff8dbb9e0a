"""The frame around every endpoint: who may ask, and the shape of everything that goes wrong.

What always holds: every reply with an error is OpenAI's `{"error": {...}}`, or Anthropic's for clients of theirs,
whatever failed and wherever; and behind the frame `scope["tenant"]` says who asks.
"""

import ipaddress
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vcli.server.anthropic import errors as anthropic_errors
from vcli.server.dashboard import files as dashboard
from vcli.server.headers import header
from vcli.server.keys import ANYONE, Keys, Tenant
from vcli.server.protocol import ApiError

# Need no API key: probes and what makes clients of a description have none, the page asks for one.
PUBLIC_PATHS = ("/health", "/ready", "/openapi.json", *dashboard.PATHS)
ADMIN_PATHS = ("/metrics", dashboard.FEED_PATH)  # tell how busy the server is


def framed(routes: Sequence[Route], middleware: Sequence[Middleware]) -> Starlette:
    """The ASGI application of one listener."""
    handlers = {ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_failure}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class KeyCheck:
    """Lets nobody past without a known key, except to the public paths; with `admin`, without an admin's key."""

    def __init__(self, app: ASGIApp, keys: Keys, *, admin: bool = False) -> None:
        self.app = app
        self.keys = keys
        self.admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["tenant"] = ANYONE if scope["path"] in PUBLIC_PATHS else self._tenant(scope)
            except ApiError as error:
                return await error_response(error, scope)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> Tenant:
        if self.admin and not self.keys.has_admin:
            return ANYONE  # on a loopback address, or `vcli serve` would not have started
        key = header(scope, "X-API-Key") or b""
        tenant = self.keys.tenant_of(header(scope, "Authorization") or b"", key)
        if tenant is None:
            message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        if (self.admin or scope["path"] in ADMIN_PATHS) and not (tenant.is_admin or tenant is ANYONE):
            raise ApiError(403, f"{scope['path'][:100]} is for admins: use the key of a tenant with is_admin = true")
        return tenant


class OriginCheck:
    """Refuses what web pages make their readers' browsers send, but for pages of origins that are let in.

    A browser asks on behalf of a page what its reader may ask, who may sit on this machine: that it keeps the answer
    from the page (CORS) is too late for the work done. It says the page's origin with whatever changes something.
    The files of the server's own page are anybody's: browsers say its origin for scripts, too. What it asks is let in
    where `keys` are given.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str] = (), keys: Keys | None = None) -> None:
        self.app = app
        self.allowed_origins = allowed_origins
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_guarded = scope["type"] == "http" and scope["path"] not in dashboard.PATHS
        if is_guarded and "*" not in self.allowed_origins:
            origin = (header(scope, "Origin") or b"").decode("latin-1")
            if origin and origin not in self.allowed_origins and not self._is_own(origin, scope):
                message = f"pages of {origin[:100]!r} may not use this server: --allowed-origins would say which may"
                return await error_response(ApiError(403, message, code="origin_refused"), scope)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _is_own(self, origin: str, scope: Scope) -> bool:
        """Is it the origin of this server's page? A name over HTTP proves nothing (DNS rebinding), but a key does."""
        scheme, _, host = origin.partition("://")
        if self.keys is None or host != (header(scope, "Host") or b"").decode("latin-1"):
            return False
        return scheme == "https" or bool(self.keys) or _is_address(host)


class HostCheck:
    """Answers to addresses and localhost only, for listeners that trust whoever can reach them.

    A page whose host's name was made to resolve to this machine (DNS rebinding) is no page of another origin to its
    browser, but it is known by that name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_address(host := (header(scope, "Host") or b"").decode("latin-1")):
            message = f"admin routes answer to an address or localhost, not to the name {host[:100]!r}"
            return await error_response(ApiError(403, message, code="host_refused"), scope)(scope, receive, send)
        return await self.app(scope, receive, send)


def error_response(error: ApiError, scope: Scope) -> Response:
    """In the shape that the client reads."""
    body = anthropic_errors.body(error) if speaks_anthropic(scope) else error.body()
    return Response(body, error.status, headers=error.headers, media_type="application/json")


def speaks_anthropic(scope: Scope) -> bool:
    """Is it one of Anthropic's clients? They say so with everything that they ask, and else their path does."""
    return f"{scope['path']}/".startswith("/v1/messages/") or bool(header(scope, "Anthropic-Version"))


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _is_address(host: str) -> bool:
    """Of a Host header: is it an IP address or localhost, with a port or without?"""
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    messages = {404: f"{what}: there is nothing here", 405: f"{what}: this path takes another method"}
    response = error_response(ApiError(error.status_code, messages.get(error.status_code, error.detail)), request.scope)
    response.headers.update(error.headers or {})
    if error.status_code == 405:  # the router names the methods of one route alone
        routes = request.app.routes
        path = next(each.path for each in routes if each.matches(request.scope)[0] != Match.NONE)
        methods = {method for each in routes if each.path == path for method in each.methods or ()}
        response.headers["allow"] = ", ".join(sorted(methods))
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log gets the traceback (from the framework), the client gets no details."""
    return error_response(ApiError(500, "the server failed on this request: its log says why"), request.scope)
