"""What replies look like, for the description at /openapi.json; replies.py and the endpoints write them.

A field without a default is always there; no reply has other fields. A test holds every reply against these.
"""

from typing import Literal

import msgspec


class Shape(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object of a reply, all of whose fields are known."""


class ErrorDetails(Shape):
    message: str  # what is wrong, the value seen, what to do
    type: str
    param: str | None  # the field that it is about
    code: str | None  # for programs


class ErrorReply(Shape):
    error: ErrorDetails


class CachedTokens(Shape):
    cached_tokens: int


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class RivalToken(Shape):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RivalToken] | None]  # by token id


class ScoredToken(Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ScoredToken):
    top_logprobs: list[ScoredToken]


class ChatLogprobs(Shape):
    content: list[ChatToken]


class CalledFunction(Shape):
    name: str
    arguments: str  # JSON


class ToolCall(Shape):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Shape):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class ChatChoice(Shape):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class FunctionDelta(Shape):
    arguments: str
    name: str | None = None  # with the first piece


class ToolCallDelta(Shape):
    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class MessageDelta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Shape):
    index: int
    delta: MessageDelta
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatChunk(Shape):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None  # in the first one


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Shape):
    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None  # in the first one


class CompletionChunk(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class EmbeddingEntry(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # base64 of float32, little-endian


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class EmbeddingList(Shape):
    id: str
    object: Literal["list"]
    model: str
    data: list[EmbeddingEntry]
    usage: EmbeddingUsage


class ModelEntry(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None  # not known while the model loads


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelEntry]


class Tokens(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Shape):
    prompt: str


class Health(Shape):
    status: Literal["ok", "dead"]
    error: str | None = None


class Readiness(Shape):
    status: Literal["ready", "loading", "restarting", "draining", "dead"]
    stage: str | None = None
    percent: float | None = None
    open_requests: int | None = None
    error: str | None = None


class Version(Shape):
    version: str
