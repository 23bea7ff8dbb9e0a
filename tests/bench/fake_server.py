"""A fake OpenAI server with known delays, so that what the client measures can be known beforehand."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from aiohttp import web


@dataclass
class FakeServer:
    """Streams a completion of `max_tokens` tokens: a pause, the first chunk, and then a chunk after each gap."""

    first_token_s: float = 0.0
    gap_s: float = 0.0
    tokens_per_chunk: int = 1
    knows_token_ids: bool = True  # False: it refuses the fields that OpenAI does not have
    sends_usage: bool = True
    counts_tokens: bool = True  # False: its usage is of no tokens
    sends_done: bool = True
    fail: str = ""  # "http": status 500; "break": the stream ends early; "error": an error event inside the stream;
    # "bytes": an event that is not UTF-8
    fail_every: int = 1  # only each n-th measured request
    fail_from: int = 0  # and none before so many
    num_running: int = 0
    most_running: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "root": "nowhere/fake", "max_model_len": 4096}]})

    async def metrics(self, request: web.Request) -> web.Response:
        lines = [
            f"vcli:num_requests_running {self.num_running}",
            'vcli:kv_cache_waste_perc{model_name="fake"} 0.02',
            f"vcli:prefix_cache_queries_total {100 * len(self.bodies)}",
            f"vcli:prefix_cache_hits_total {25 * len(self.bodies)}",
            "vcli:num_preemptions_total 3",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not self.knows_token_ids and "return_token_ids" in body:
            return web.json_response({"error": {"message": "unknown field return_token_ids"}}, status=400)
        self.bodies.append(body)
        fails = bool(self.fail) and len(self.bodies) % self.fail_every == 0 and len(self.bodies) > self.fail_from
        if fails and self.fail == "http":
            return web.json_response({"error": {"message": "out of coffee"}}, status=500)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            return await self._stream(request, body, self.fail if fails else "")
        finally:
            self.num_running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fail: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        is_chat = "messages" in body
        kind = {"object": "chat.completion.chunk" if is_chat else "text_completion"}

        async def send(event: Any) -> None:
            event = event if isinstance(event, str) else json.dumps({**kind, **event})
            await response.write(f"data: {event}\n\n".encode())

        if is_chat:
            await send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        num_left = num_tokens = body["max_tokens"]
        await asyncio.sleep(self.first_token_s)
        while num_left:
            num_now = min(self.tokens_per_chunk, num_left)
            text = {"delta": {"content": "word " * num_now}} if is_chat else {"text": "word " * num_now}
            token_ids = {"token_ids": [1] * num_now} if body.get("return_token_ids") else {}
            await send({"choices": [{**text, **token_ids, "finish_reason": None}]})
            num_left -= num_now
            if fail == "bytes":
                await response.write(b'data: {"choices": [{"text": "\xff"}]}\n\n')
            if fail == "break":
                return response
            if fail == "error":
                await send({"error": {"message": "the engine died"}})
                return response
            if num_left:
                await asyncio.sleep(self.gap_s)
        await send({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
        num_prompt = len(body["prompt"]) if not is_chat else 7
        if self.sends_usage:
            usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens if self.counts_tokens else 0}
            await send({"choices": [], "usage": usage})
        if self.sends_done:
            await send("[DONE]")
        return response


@contextlib.contextmanager
def running_fake_server(server: FakeServer | None = None) -> Iterator[FakeServer]:
    """The server, listening in a thread of its own; its fields may be changed while it runs."""
    server = server or FakeServer()
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_post("/v1/chat/completions", server.completions)
    runner = web.AppRunner(app)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield server
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
