"""/v1/responses and what is below it: make a response, have it shown again or streamed again, cancel it, delete it.

A response is made as a chat is. One with background: true is a stream that needs no client: whoever has its id may
follow it from any event on, and a cancelled one ends as if its client had gone.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vcli.server import docs, streaming
from vcli.server.chat import Prompt
from vcli.server.frame import json_response
from vcli.server.generation import ChatCompletions
from vcli.server.openapi import Operation
from vcli.server.protocol import ApiError, convert_query
from vcli.server.replies import Reply
from vcli.server.responses.protocol import (
    Conversation,
    InputTokensRequest,
    ItemsQuery,
    ResponsesRequest,
    RetrieveQuery,
    shown,
)
from vcli.server.responses.reply import ResponseReply
from vcli.server.responses.store import Stored
from vcli.server.service import Service

RENAMED = {  # parameters of a chat
    r"max_tokens\b": "max_output_tokens",
    r"messages\b": "input",
    r"response_format(\.json_schema)?\b": "text.format",
    r"(tools\[\d+\])\.function\b": r"\1",
}


def response_operations(service: Service) -> list[Operation]:
    stored, one = StoredResponses(service), "/v1/responses/{response_id}"
    return [
        Operation("POST", "/v1/responses", Responses(service), docs.RESPONSES),
        Operation("POST", "/v1/responses/input_tokens", InputTokens(service), docs.INPUT_TOKENS),
        Operation("GET", one, Retrieval(service), docs.RESPONSE),
        Operation("DELETE", one, stored.delete, docs.DELETE_RESPONSE),
        Operation("POST", f"{one}/cancel", stored.cancel, docs.CANCEL_RESPONSE),
        Operation("GET", f"{one}/input_items", stored.input_items, docs.INPUT_ITEMS),
    ]


class Responses(ChatCompletions):
    """POST /v1/responses"""

    decoder = msgspec.json.Decoder(ResponsesRequest)
    their_names = RENAMED

    async def generation_request(self, asked: ResponsesRequest, scope: Scope) -> Conversation:
        asked.check()
        owner = scope["tenant"].name
        if not asked.previous_response_id:
            return asked.as_conversation([], owner)
        previous = self.service.responses.find(asked.previous_response_id, owner, "previous_response_id")
        return asked.as_conversation(previous.conversation(), owner)

    async def serve(
        self,
        scope: Scope,
        asked: ResponsesRequest,
        answer: Callable[[Receive, Send], Awaitable[None]],
        receive: Receive,
        send: Send,
    ) -> None:
        if not asked.background:
            await super().serve(scope, asked, answer, receive, send)
            return
        owner = scope["tenant"].name
        made = self.service.replays.start_in_background(answer, owner)
        if asked.stream:
            await made.follow(1, receive, send)
        else:
            await made.begin()
            await streaming.send_json(send, self.service.responses.find(made.id, owner).json(), made.id)

    async def reply(self, asked: ResponsesRequest, request: Any, prompts: list[Prompt], n: int) -> Reply:
        ready = self.service.require_ready()
        return ResponseReply(asked, partial(self._store, request), ready.default_sampling, **self.common(prompts, n))

    def _store(self, request: Conversation, reply: ResponseReply) -> None:
        asked, store = reply.asked, self.service.responses
        was_deleted = asked.background and reply.is_done and reply.id not in store
        if not asked.is_stored or was_deleted or (reply.status == "cancelled" and not asked.background):
            return
        stored = Stored(
            id=reply.id,
            owner=request.owner,
            items=msgspec.json.encode(request.items),
            body=reply.json() if reply.is_done else reply.json,
            replay=self.service.replays.of(reply.id) if asked.background else None,
        )
        store.put(stored)


class InputTokens(Responses):
    """POST /v1/responses/input_tokens: how long the prompt of such a response is."""

    decoder = msgspec.json.Decoder(InputTokensRequest)

    async def serve(
        self,
        scope: Scope,
        asked: InputTokensRequest,
        answer: Callable[[Receive, Send], Awaitable[None]],
        receive: Receive,
        send: Send,
    ) -> None:
        whole = ResponsesRequest(**{name: getattr(asked, name) for name in asked.__struct_fields__})
        request = await self.generation_request(whole, scope)
        self.service.check_model(request.model)
        request.refuse_unsupported()
        with scope["tenant"].budget.enter(1, self.service.admission.reject):
            [prompt] = await self.prompts(request, self.service.require_ready())
        count = {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
        await json_response(count)(scope, receive, send)


class Retrieval:
    """GET /v1/responses/{id}: a response as it is now, or with stream=true its events, from any number on."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = convert_query(scope["query_string"], RetrieveQuery)
        stored = _find(self.service, scope)
        if not query.stream:
            if query.starting_after is not None:
                raise ApiError(400, "starting_after needs stream=true", param="starting_after")
            await streaming.send_json(send, stored.json(), stored.id)
            return
        number = (
            0 if query.starting_after is None else query.starting_after + 1
        )  # replays count from 1, responses from 0
        if stored.replay is None:
            message = f"the response {stored.id!r} was not made with background: true: ask for it without stream"
            raise ApiError(400, message, param="stream")
        if not stored.replay.keeps_after(number):
            message = "so old events are not kept any more: ask for the response without stream"
            raise ApiError(404, message, param="starting_after", code="stream_gone")
        await stored.replay.follow(number + 1, receive, send)


class StoredResponses:
    """The endpoints for responses that are there, as far as they answer at once."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def delete(self, request: Request) -> Response:
        stored = _find(self.service, request.scope)
        self.service.responses.remove(stored)
        return json_response({"id": stored.id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """End a response that is made in the background; one that is done stays what it is."""
        stored = _find(self.service, request.scope)
        if stored.replay is None:
            raise ApiError(400, f"only responses made with background: true can be cancelled, {stored.id!r} was not")
        await stored.replay.end()
        return Response(_find(self.service, request.scope).json(), media_type="application/json")

    async def input_items(self, request: Request) -> Response:
        """What led to a response, item by item, the last one first unless order=asc."""
        query = convert_query(request.scope["query_string"], ItemsQuery)
        stored = _find(self.service, request.scope)
        items = [shown(item, index) for index, item in enumerate(stored.input_items())]
        return json_response(_page(items if query.order == "asc" else items[::-1], query))


def _page(items: list[dict[str, Any]], query: ItemsQuery) -> dict[str, Any]:
    start = 0
    if query.after is not None:
        start = next((index for index, item in enumerate(items, start=1) if item["id"] == query.after), 0)
        if not start:
            raise ApiError(400, f"after: there is no item {query.after[:100]!r} in this response", param="after")
    end = start + query.limit
    page = items[start:end]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": end < len(items),
    }


def _find(service: Service, scope: Scope) -> Stored:
    return service.responses.find(scope["path_params"]["response_id"], scope["tenant"].name)
