"""How an endpoint generates, and the two of OpenAI's older APIs: /v1/chat/completions and /v1/completions.

Each call reads top to bottom in `_answer`: check, enter, tokenize, submit, reply. They are plain ASGI applications, so
that one function holds a request from its first byte to its last; that of a client that may come back runs in a task
of its own (replay.py), and the client follows it.
"""

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from engine.errors import EngineDeadError, GrammarFailedError, RequestFailedError
from engine.messages import Ready
from engine.quarantine import REFUSED_S, QuarantinedError
from engine.request_stream import RequestStream
from engine.sampling_params import SamplingParams
from vcli.server import chat, replay, streaming, structured
from vcli.server.admission import Place
from vcli.server.answer_grammar import shaped_answer
from vcli.server.bodies import ClientGoneError
from vcli.server.chat import Prompt
from vcli.server.choices import ChatReply, CompletionReply
from vcli.server.headers import milliseconds
from vcli.server.keys import Tenant
from vcli.server.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from vcli.server.replies import Reply, StreamedReply
from vcli.server.request_log import note_generation
from vcli.server.service import Service
from vcli.server.tracing import trace_generation

MAX_DEADLINE_MS = 10**9 - 1  # eleven days

log = logging.getLogger("vcli")


class GenerationEndpoint(ABC):
    """One ASGI application for each API; they differ in how a body asks, how prompts are made and replies are shaped.

    An API with a shape of its own decodes its bodies into its own struct (`decoder`), says what of OpenAI's would ask
    the same (`generation_request`), and replies from both (`reply`); errors name its own parameters (`their_names`).
    """

    decoder: msgspec.json.Decoder[Any]
    their_names: Mapping[str, str] = {}  # of our parameters, by regular expressions

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._take(scope, receive, send)
        except ApiError as error:
            raise error.renamed(self.their_names) from None

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival_time = time.monotonic()
        if (event_id := replay.last_event_id(scope)) is not None:
            followed, number = self.service.replays.find(event_id, scope["tenant"].name)
            await followed.follow(number, receive, send)
            return
        try:
            asked = await self.service.bodies.read(self.decoder, scope, receive)
        except ClientGoneError:
            return
        await self.serve(scope, asked, partial(self._answer, scope, asked, arrival_time), receive, send)

    async def serve(
        self,
        scope: Scope,
        asked: Any,
        answer: Callable[[Receive, Send], Awaitable[None]],
        receive: Receive,
        send: Send,
    ) -> None:
        """Have the answer made: for this connection, or so that the client may come back for the rest."""
        if not asked.stream or not (grace_s := replay.grace_s(scope)):
            await answer(receive, send)
        else:
            await self.service.replays.start(answer, grace_s, scope["tenant"].name).follow(1, receive, send)

    async def _answer(self, scope: Scope, asked: Any, arrival_time: float, receive: Receive, send: Send) -> None:
        service, tenant = self.service, scope["tenant"]
        request = await self.generation_request(asked, scope)
        service.check_model(request.model)
        request.refuse_unsupported()
        service.check_priority(request.priority)
        tenant.check_priority(request.priority or 0)
        ready = service.require_ready()
        params, form = structured.with_form(request.sampling_params(ready.default_sampling), request)
        prompt_limit = request.prompt_limit(ready.max_model_len)
        num_sequences = request.num_prompts * params.n
        budget = tenant.budget.enter(num_sequences, service.admission.reject)
        entry = service.admission.enter(
            num_sequences,
            max_running=ready.max_num_seqs,
            max_tokens=params.max_tokens,
            priority=request.priority or 0,
            arrival_time=arrival_time,
            deadline_s=deadline_s(scope),
        )
        with budget, entry as place:
            prompts = [chat.truncated(prompt, prompt_limit) for prompt in await self.prompts(request, ready)]
            place.take_prompts([len(prompt.token_ids) for prompt in prompts])
            await service.check_grammar(params.grammar, form)
            params = await self.shaped(params, prompts)
            reply = await self.reply(asked, request, prompts, params.n)
            streams = self._submit(request, prompts, params, reply.id, tenant)
            tenant.budget.spend(sum(len(prompt.token_ids) for prompt in prompts))
            try:
                async with streaming.abort_at_disconnect(receive, streams):
                    with place.limit_time(streams):
                        if request.stream:
                            assert isinstance(reply, StreamedReply)
                            await self._until_begun(place, streams)
                            await self._send_events(send, streams, reply)
                        else:
                            await self._send_whole(send, streams, reply)
            finally:
                tenant.budget.spend(sum(stream.state.timings.num_output_tokens for stream in streams))
                with_text = service.config.log_requests == "text"
                note_generation(scope, reply.id, prompts, streams, with_text=with_text)
                trace_generation(scope, service.model_name, reply.id, params, streams)

    async def generation_request(self, asked: Any, scope: Scope) -> GenerationRequest:
        """What a body asks, as one of OpenAI's older APIs would have it. Raises ApiError."""
        request: GenerationRequest = asked
        return request

    @abstractmethod
    async def prompts(self, request: Any, ready: Ready) -> list[Prompt]:
        """The prompts of a call as token ids. Raises ApiError."""

    async def shaped(self, params: SamplingParams, prompts: list[Prompt]) -> SamplingParams:
        """With what the prompts say of their answers. Raises ApiError."""
        return params

    @abstractmethod
    async def reply(self, asked: Any, request: Any, prompts: list[Prompt], n: int) -> Reply:
        """The empty reply to a call. asked: as it was decoded; request: what was made of it."""

    def common(self, prompts: list[Prompt], n: int) -> dict[str, Any]:
        """What every Reply is made with."""
        service = self.service
        return {"model": service.model_name, "prompts": prompts, "n": n, "tokenizer": service.engine.tokenizer}

    def _submit(
        self,
        request: GenerationRequest,
        prompts: list[Prompt],
        params: SamplingParams,
        request_id: str,
        tenant: Tenant,
    ) -> list[RequestStream]:
        """One stream for each prompt. Raises ApiError, and then none of them runs."""
        streams: list[RequestStream] = []
        try:
            for index, prompt in enumerate(prompts):
                stream = self.service.engine.submit(
                    prompt.token_ids,
                    params,
                    request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
                    priority=request.priority or 0,
                    cache_salt=tenant.salt(request.cache_salt or ""),
                )
                streams.append(stream)
        except (ValueError, EngineDeadError, QuarantinedError) as error:
            for stream in streams:
                stream.abort()
            raise self._as_api_error(error, prompts[len(streams)]) from None
        return streams

    def _as_api_error(self, error: Exception, prompt: Prompt) -> ApiError:
        if isinstance(error, EngineDeadError):
            return engine_dead(error)
        if isinstance(error, QuarantinedError):  # no 5xx: a client would try again by itself
            return self.service.admission.reject(error.code, 422, str(error), int(REFUSED_S))
        ready = self.service.engine.ready
        is_too_long = ready is not None and len(prompt.token_ids) >= ready.max_model_len
        return ApiError(400, str(error), code="context_length_exceeded" if is_too_long else None)

    async def _until_begun(self, place: Place, streams: list[RequestStream]) -> None:
        """A reply that has a deadline begins with its first token: until then a plain error can say that it is late."""
        if place.deadline_s is not None:
            with contextlib.suppress(EngineDeadError, RequestFailedError):  # which are told as events
                await streams[0].wait()

    async def _send_whole(self, send: Send, streams: list[RequestStream], reply: Reply) -> None:
        meter = self.service.metrics.meter()
        try:
            async for prompt_index, deltas in streaming.interleave(streams):
                meter.on_deltas(prompt_index, deltas)
                for delta in deltas:
                    reply.add(prompt_index, delta, keep=True)
        except EngineDeadError as error:
            raise engine_dead(error) from None
        except RequestFailedError as error:
            raise request_failed(error) from None
        # In a thread: log probabilities of many long sequences are a lot of JSON.
        await streaming.send_json(send, await asyncio.to_thread(reply.whole), reply.id)

    async def _send_events(self, send: Send, streams: list[RequestStream], reply: StreamedReply) -> None:
        meter = self.service.metrics.meter()
        await streaming.start_events(send, reply.id)
        try:
            if head := reply.head():
                await streaming.send_events(send, head)
            async with streaming.kept_alive(send):
                async for prompt_index, deltas in streaming.interleave(streams):
                    meter.on_deltas(prompt_index, deltas)
                    if events := b"".join([reply.event(prompt_index, delta) for delta in deltas]):
                        await streaming.send_events(send, events)
            tail = reply.tail()
        except EngineDeadError as error:
            tail = reply.error_event(engine_dead(error))
        except RequestFailedError as error:
            tail = reply.error_event(request_failed(error))
        except ApiError as error:
            tail = reply.error_event(error)
        except Exception:
            log.exception("a reply failed halfway")
            tail = reply.error_event(ApiError(500, "the server failed on this request: its log says why"))
        await streaming.send_events(send, tail, is_last=True)


class ChatCompletions(GenerationEndpoint):
    decoder = msgspec.json.Decoder(ChatRequest)

    async def prompts(self, request: ChatRequest, ready: Ready) -> list[Prompt]:
        text = await self.service.render(request)
        [prompt] = await chat.encode_texts(
            self.service.require_tokenizer(),
            [text],
            ready.max_model_len,
            add_special_tokens=bool(request.add_special_tokens),  # the template has written them
        )
        return [replace(prompt, form=chat.answer_form(self.service.dialect, text, request))]

    async def shaped(self, params: SamplingParams, prompts: list[Prompt]) -> SamplingParams:
        form = prompts[0].form
        if form is None:
            return params
        special_tokens = self.service.require_tokenizer().special_tokens
        return await shaped_answer(params, form, special_tokens, self.service.check_grammar)

    async def reply(self, asked: Any, request: ChatRequest, prompts: list[Prompt], n: int) -> Reply:
        return ChatReply(request, **self.common(prompts, n))


class Completions(GenerationEndpoint):
    decoder = msgspec.json.Decoder(CompletionRequest)

    async def prompts(self, request: CompletionRequest, ready: Ready) -> list[Prompt]:
        given = request.prompts()
        token_prompts = [Prompt(prompt, None) for prompt in given if isinstance(prompt, list)]
        if token_prompts:
            return token_prompts
        return await chat.encode_texts(
            self.service.require_tokenizer(),
            [prompt for prompt in given if isinstance(prompt, str)],
            ready.max_model_len,
            add_special_tokens=request.add_special_tokens is not False,
        )

    async def reply(self, asked: Any, request: CompletionRequest, prompts: list[Prompt], n: int) -> Reply:
        echoes = [await self._text(prompt) if request.echo else "" for prompt in prompts]
        return CompletionReply(request, echoes, **self.common(prompts, n))

    async def _text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return await chat.decode_tokens(self.service.require_tokenizer(), prompt.token_ids)


def deadline_s(scope: Scope) -> float | None:
    """How long the client will wait for the whole answer, if it says so. Raises ApiError for no number of ms."""
    deadline_ms = milliseconds(scope, "X-Request-Deadline-Ms", least=1, most=MAX_DEADLINE_MS)
    return None if deadline_ms is None else deadline_ms / 1000


def engine_dead(error: EngineDeadError) -> ApiError:
    return ApiError(500, f"the engine died: {error}", code="engine_dead")


def request_failed(error: RequestFailedError) -> ApiError:
    return ApiError(400 if isinstance(error, GrammarFailedError) else 500, str(error), code=error.code)
