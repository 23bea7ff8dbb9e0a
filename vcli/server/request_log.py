"""A line in the log for each request, where --log-requests asks for it.

A line is JSON, so that nothing that a client sends can look like another line. What always holds: without
`--log-requests text` no text of a prompt or an answer gets into the log.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.request_stream import RequestStream
from vcli.server.chat import Prompt

log = logging.getLogger("vcli.requests")


class RequestLog:
    """Writes the line when the reply has ended, and another one at the end of one that outlives its connection.

    What others know about the request they put into `scope["log"]`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        log.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        entry = scope["log"] = {"method": scope["method"], "path": scope["path"], "status": None}
        start = time.monotonic()

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            entry["seconds"] = round(time.monotonic() - start, 6)
            if (tenant := scope.get("tenant")) and tenant.name:
                entry["tenant"] = tenant.name
            _write(entry)


def note_generation(
    scope: Scope, request_id: str, prompts: Sequence[Prompt], streams: Sequence[RequestStream], *, with_text: bool
) -> None:
    """What came of a call that generates, for its line in the log."""
    if "log" not in scope:
        return
    timings = [stream.state.timings for stream in streams]
    entry = scope["log"]
    entry |= {
        "id": request_id,
        "prompt_tokens": sum(each.num_prompt_tokens for each in timings),
        "cached_tokens": sum(each.num_cached_tokens for each in timings),
        "output_tokens": sum(each.num_output_tokens for each in timings),
        "finish_reasons": [reason for each in timings for reason in each.finish_reasons],
    }
    if with_text:
        outputs = [output for stream in streams for output in stream.state.result().outputs]
        entry |= {
            "prompts": [prompt.token_ids if prompt.text is None else prompt.text for prompt in prompts],
            "answers": [output.text or output.token_ids for output in outputs],
        }
    if "seconds" in entry:  # its connection has ended long ago, and the line of that did not know yet
        entry["seconds"] = round(time.monotonic() - min(each.arrival_time for each in timings), 6)
        _write(entry)


def _write(entry: dict[str, Any]) -> None:
    log.info(msgspec.json.encode(entry).decode(), extra={"event": "request", "fields": entry})
