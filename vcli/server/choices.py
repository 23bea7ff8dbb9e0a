"""The replies of OpenAI's two older APIs: choices of texts or of messages.

An event is the same bytes for every token but for a few: the prefix is encoded once for each request and only the text
(and what was asked for beside it) for each delta.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from engine.messages import TokenLogprob
from engine.outputs import OutputDelta, PromptLogprobs
from vcli.server.parts import Arguments, CallBegun, Part, Reasoning, Text
from vcli.server.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from vcli.server.replies import Choice, StreamedReply, encode, finite

DONE = b"data: [DONE]\n\n"


class ChoicesReply(StreamedReply):
    """A reply in the shape that OpenAI's two older APIs share."""

    object_name: str  # OpenAI's name of the whole reply, and of a piece of it
    chunk_name: str

    def __init__(self, request: GenerationRequest, **common: Any) -> None:
        super().__init__(**common)
        options = request.stream_options or StreamOptions()
        self.usage_at_end = bool(options.include_usage)
        self.usage_in_every_event = bool(options.continuous_usage_stats)
        self.has_token_ids = bool(request.return_token_ids) or self.tokenizer is None
        self.names_tokens_by_id = bool(request.return_tokens_as_token_ids)
        head = {"id": self.id, "object": self.chunk_name, "created": self.created, "model": self.model}
        self._event_prefix = b"data: " + encode(head)[:-1] + b',"choices":['

    def event(self, prompt_index: int, delta: OutputDelta) -> bytes:
        """A delta as one server-sent event."""
        choice = self.add(prompt_index, delta, keep=False)
        is_first, choice.has_started = not choice.has_started, True
        index = b'{"index":%d,' % (prompt_index * self.n + delta.index)
        content = self._delta(prompt_index, choice, delta, is_first=is_first)
        if not content and not self.usage_in_every_event:
            return b""
        parts = [self._event_prefix, index, content or b'"delta":{}']
        if choice.finish_reason is None:
            parts.append(b',"finish_reason":null}]')
        else:
            reasons = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            parts += [b",", encode(reasons)[1:], b"]"]
        if is_first and (extras := self._extras()):
            parts += [b",", encode(extras)[1:-1]]
        if self.usage_in_every_event:
            parts += [b',"usage":', encode(self.usage())]
        return b"".join([*parts, b"}\n\n"])

    def tail(self) -> bytes:
        if not self.usage_at_end:
            return DONE
        return b"".join([self._event_prefix, b'],"usage":', encode(self.usage()), b"}\n\n", DONE])

    def error_event(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def whole(self) -> bytes:
        body: dict[str, Any] = {
            "id": self.id,
            "object": self.object_name,
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._shown_choices())],
            "usage": self.usage(),
        }
        return encode(body | self._extras())

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens)},
        }

    @abstractmethod
    def _delta(self, prompt_index: int, choice: Choice, delta: OutputDelta, *, is_first: bool) -> bytes:
        """The part of an event that differs between the APIs. Empty where there is nothing to say yet."""

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of the whole reply."""

    def _shown_choices(self) -> list[Choice]:
        return self.choices

    def _extras(self) -> dict[str, Any]:
        """What stands beside the choices of a whole reply, and of the first event of each choice."""
        return {}

    def _token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.names_tokens_by_id else super()._token_text(token_id)


class ChatReply(ChoicesReply):
    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, request: ChatRequest, **common: Any) -> None:
        super().__init__(request, **common)
        self.has_logprobs = bool(request.logprobs)

    def _delta(self, prompt_index: int, choice: Choice, delta: OutputDelta, *, is_first: bool) -> bytes:
        if choice.parser is not None:
            message = _delta_message(self.parts(choice, delta))
            is_silent = (
                not message and choice.finish_reason is None and not self.has_logprobs and not self.has_token_ids
            )
            if is_silent and not is_first:
                return b""
            parts = [b'"delta":', encode(({"role": "assistant", "content": ""} if is_first else {}) | message)]
        elif is_first:
            parts = [b'"delta":{"role":"assistant","content":', encode(delta.text), b"}"]
        elif delta.text:
            parts = [b'"delta":{"content":', encode(delta.text), b"}"]
        else:
            parts = [b'"delta":{}']
        if self.has_logprobs:
            parts += [b',"logprobs":', encode(self._logprobs(delta.logprobs or []))]
        if self.has_token_ids:
            parts += [b',"token_ids":', encode(delta.token_ids)]
        return b"".join(parts)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = _whole_message(self.whole_parts(choice))
        body: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs) if self.has_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return body | ({"token_ids": choice.token_ids} if self.has_token_ids else {})

    def _extras(self) -> dict[str, Any]:
        prompt_logprobs = self.prompt_logprobs[0]
        extras: dict[str, Any] = {}
        if prompt_logprobs is not None:
            extras["prompt_logprobs"] = _prompt_logprobs(prompt_logprobs, self._token_text)
        if self.has_token_ids:
            extras["prompt_token_ids"] = self.prompts[0].token_ids
        return extras

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": self.token_logprobs(logprobs)}


def _delta_message(parts: list[Part]) -> dict[str, Any]:
    """What some parts add to a message."""
    texts, thoughts, calls = _sorted(parts)
    message: dict[str, Any] = _thoughts(thoughts) | ({"content": "".join(texts)} if texts else {})
    if calls:
        message["tool_calls"] = [{"index": index, **call} for index, call in calls.items()]
    return message


def _whole_message(parts: list[Part]) -> dict[str, Any]:
    texts, thoughts, calls = _sorted(parts)
    content = None if calls and not texts else "".join(texts)
    message = {"role": "assistant", "content": content, **_thoughts(thoughts)}
    return message | {"tool_calls": list(calls.values())} if calls else message


def _thoughts(thoughts: list[str]) -> dict[str, str]:
    """DeepSeek's name for it, and the one that others chose later."""
    return {"reasoning_content": "".join(thoughts), "reasoning": "".join(thoughts)} if thoughts else {}


def _sorted(parts: list[Part]) -> tuple[list[str], list[str], dict[int, dict[str, Any]]]:
    """Texts, thoughts and tool calls; of calls that began earlier only the arguments."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        match part:
            case Text(text):
                texts.append(text)
            case Reasoning(text):
                thoughts.append(text)
            case CallBegun(index, call_id, name):
                calls[index] = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
            case Arguments(index, text):
                call = calls.setdefault(index, {"function": {"arguments": ""}})
                call["function"]["arguments"] += text
    return texts, thoughts, calls


class CompletionReply(ChoicesReply):
    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, request: CompletionRequest, echoes: list[str], **common: Any) -> None:
        super().__init__(request, **common)
        self.num_shown = request.n or 1  # choices for each prompt, the best of self.n
        self.echoes = echoes  # what to say before the answer to each prompt; empty strings without `echo`
        self.has_echo = bool(request.echo)
        self.drops_output = request.drops_output
        self.has_logprobs = request.logprobs is not None
        self.has_prompt_logprobs = request.prompt_logprobs is not None

    def add(self, prompt_index: int, delta: OutputDelta, *, keep: bool) -> Choice:
        if self.drops_output:
            delta.text, delta.token_ids, delta.logprobs = "", [], []
        return super().add(prompt_index, delta, keep=keep)

    def _delta(self, prompt_index: int, choice: Choice, delta: OutputDelta, *, is_first: bool) -> bytes:
        echo = self.echoes[prompt_index] if is_first else ""
        parts = [b'"text":', encode(echo + delta.text)]
        if self.has_logprobs:
            tokens = self._echoed_logprobs(prompt_index) if is_first else []
            parts += [b',"logprobs":', encode(self._logprobs([*tokens, *(delta.logprobs or [])], choice, prompt_index))]
        if self.has_token_ids:
            parts += [b',"token_ids":', encode(delta.token_ids)]
            parts += [b',"prompt_token_ids":', encode(choice.prompt.token_ids)] if is_first else []
        return b"".join(parts)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        prompt_index = index // self.num_shown
        body: dict[str, Any] = {
            "index": index,
            "text": self.echoes[prompt_index] + "".join(choice.texts),
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        prompt_logprobs = self.prompt_logprobs[prompt_index]
        if self.has_logprobs:
            tokens = [*self._echoed_logprobs(prompt_index), *choice.logprobs]
            body["logprobs"] = self._logprobs(tokens, choice, prompt_index)
        if self.has_prompt_logprobs and prompt_logprobs is not None:
            body["prompt_logprobs"] = _prompt_logprobs(prompt_logprobs, self._token_text)
        if self.has_token_ids:
            body |= {"token_ids": choice.token_ids, "prompt_token_ids": choice.prompt.token_ids}
        return body

    def _shown_choices(self) -> list[Choice]:
        """With best_of: the choices for each prompt whose tokens are the likeliest on average, best first."""
        if self.num_shown == self.n:
            return self.choices
        groups = [self.choices[start : start + self.n] for start in range(0, len(self.choices), self.n)]
        return [choice for group in groups for choice in sorted(group, key=_surprise)[: self.num_shown]]

    def _echoed_logprobs(self, prompt_index: int) -> Sequence[TokenLogprob | None]:
        return (self.prompt_logprobs[prompt_index] or []) if self.has_echo else []

    def _logprobs(
        self, tokens: Sequence[TokenLogprob | None], choice: Choice, prompt_index: int
    ) -> dict[str, list[Any]]:
        """OpenAI's parallel lists. None stands for a prompt's first token, which nothing predicts."""
        first_token_id = choice.prompt.token_ids[0]
        texts, offsets = [], []
        for token in tokens:
            texts.append(self._token_text(first_token_id if token is None else token.token_id))
            offsets.append(choice.text_offset)
            choice.text_offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [None if token is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token is None else self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        return {self._token_text(token_id): finite(logprob) for token_id, logprob in token.top}


def _prompt_logprobs(logprobs: PromptLogprobs, token_text: Any) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token what the model thought of it and of its rivals, by token id."""
    return [None if token is None else _rivals(token, token_text) for token in logprobs]


def _rivals(token: TokenLogprob, token_text: Any) -> dict[str, Any]:
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(token.top, start=1)}
    ranked[token.token_id] = (token.logprob, token.rank)
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": token_text(token_id)}
        for token_id, (logprob, rank) in ranked.items()
    }


def _surprise(choice: Choice) -> float:
    """Of a token, on average."""
    return -sum(finite(token.logprob) for token in choice.logprobs) / max(len(choice.logprobs), 1)
