"""The load client: streams completions from an OpenAI-compatible server and notes when each token arrived."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from bench.metrics import RequestRecord
from bench.workloads import Answer, BenchRequest

# Uvicorn drops idle connections after 5 s: leave them earlier, so that no request is sent into a closing one.
KEEPALIVE_S = 2.0
CONNECT_TIMEOUT_S = 60.0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None

    @property
    def has_content(self) -> bool:
        return bool(self.token_ids or self.content or (self.delta and self.delta.reasoning_content))

    @property
    def content(self) -> str:
        return self.text or (self.delta and self.delta.content) or ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class RefusedError(Exception):
    """The server answered with an error, or with what is no whole answer."""


@dataclass
class LoadClient:
    """Sends requests to one server. Owns its connections: use it with `async with`."""

    url: str
    model: str
    api_key: str = ""
    extensions: dict[str, Any] = field(default_factory=dict)  # request fields of this server; None: one it must not get
    timeout_s: float = 600.0  # longest silence of a server
    keeps_uncounted: bool = False  # somebody has the tokenizer and counts what the server does not
    clock: Callable[[], float] = time.perf_counter

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self.timeout_s),
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def send(self, request: BenchRequest) -> RequestRecord:
        """Run one request to its end. Never raises for a failure: the record holds it."""
        record, _ = await self.exchange(request)
        return record

    async def exchange(self, request: BenchRequest) -> tuple[RequestRecord, Answer]:
        """The same, and what came."""
        path, body = self._compose(request)
        record, choices = RequestRecord(sent=self.clock()), list[_Choice]()
        try:
            async with self._session.post(self.url + path, json=body) as response:
                if response.status != 200:
                    raise RefusedError(f"HTTP {response.status}: {_error_message(await response.text())}")
                await self._receive(response, request, record, choices)
        except aiohttp.ConnectionTimeoutError:
            record.error = f"no connection within {CONNECT_TIMEOUT_S:g} s"
        except TimeoutError:
            record.error = f"no data for {self.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, RefusedError, msgspec.MsgspecError, UnicodeError) as error:
            record.error = str(error) or type(error).__name__
        record.ended = self.clock()
        token_ids = [token for choice in choices for token in choice.token_ids or []]
        return record, Answer("".join(choice.content for choice in choices), token_ids)

    async def get(self, path: str) -> str:
        """The body of a GET. Raises aiohttp.ClientError, OSError or TimeoutError."""
        async with self._session.get(self.url + path, raise_for_status=True) as response:
            return await response.text()

    def _compose(self, request: BenchRequest) -> tuple[str, dict[str, Any]]:
        body = {
            "model": self.model,
            "max_tokens": request.output_len,
            "temperature": request.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extensions,
        }
        if request.repeat and "cache_salt" in body:
            body["cache_salt"] += f"-{request.repeat}"
        body = {name: value for name, value in body.items() if value is not None}
        if request.messages is not None:
            return "/v1/chat/completions", {**body, "messages": request.messages}
        return "/v1/completions", {**body, "prompt": request.prompt}

    async def _receive(
        self,
        response: aiohttp.ClientResponse,
        request: BenchRequest,
        record: RequestRecord,
        all_choices: list[_Choice],
    ) -> None:
        usage: _Usage | None = None
        by_content: list[tuple[float, int]] = []  # arrivals with text, and in how many events it came
        async for now, chunks in _read_stream(response, self.clock):
            for chunk in chunks:
                if chunk.error:
                    raise RefusedError(_error_message(chunk.error))
                usage = chunk.usage or usage
            choices = [choice for chunk in chunks for choice in chunk.choices]
            all_choices += choices
            if num_tokens := sum(len(choice.token_ids or []) for choice in choices):
                record.chunks.append((now, num_tokens))
            if num_events := sum(choice.has_content for choice in choices):
                by_content.append((now, num_events))
        if not record.chunks and not by_content:
            raise RefusedError("the stream ended without a token")
        if usage is not None and (record.chunks or usage.completion_tokens):
            record.num_prompt_tokens = usage.prompt_tokens
            record.chunks = record.chunks or spread(by_content, usage.completion_tokens)
        elif self.keeps_uncounted:
            record.chunks = by_content
            record.num_prompt_tokens = len(request.prompt) if isinstance(request.prompt, list) else 0
            record.uncounted = request.text, "".join(choice.content for choice in all_choices)
        else:
            raise RefusedError(
                "the server reports no usage (stream_options.include_usage), or one of no tokens: they cannot "
                "be counted without --tokenizer, its model's"
            )


async def _read_stream(
    response: aiohttp.ClientResponse, clock: Callable[[], float]
) -> AsyncIterator[tuple[float, list[_Chunk]]]:
    """The server-sent events of each arrival, with its time."""
    rest, is_done = b"", False
    async for data in response.content.iter_any():
        now = clock()
        *lines, rest = (rest + data).split(b"\n")
        payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        chunks = [_decode(payload) for payload in payloads if payload != b"[DONE]"]
        # transformers' server ends a stream with its usage.
        is_done |= b"[DONE]" in payloads or any(chunk.usage for chunk in chunks)
        yield now, chunks
    if not is_done:
        raise RefusedError("the stream broke off before [DONE]")


def spread(chunks: list[tuple[float, int]], num_tokens: int) -> list[tuple[float, int]]:
    """The arrivals with `num_tokens` laid evenly over them, for a stream that does not say how many came in each.

    The first arrival always holds a token; a later one left without any falls out.
    """
    edges = [-(-num_tokens * (i + 1) // len(chunks)) for i in range(len(chunks))]
    shares = [edge - before for before, edge in zip([0, *edges], edges, strict=False)]
    return [(now, share) for (now, _), share in zip(chunks, shares, strict=True) if share]


def _error_message(body: Any) -> str:
    """The message inside an OpenAI-shaped error, or the start of whatever came instead."""
    if isinstance(body, str):
        try:
            body = msgspec.json.decode(body)
        except msgspec.DecodeError:
            return str(body).strip()[:300]
    inner = body.get("error", body) if isinstance(body, dict) else body
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:300]
