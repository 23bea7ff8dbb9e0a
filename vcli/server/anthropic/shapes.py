"""What replies to Anthropic's clients look like, for the description at /openapi.json; see ../shapes.py."""

from typing import Any, Literal

from vcli.server.shapes import Shape


class ErrorCode(Shape):
    error_code: str


class ErrorDetails(Shape):
    type: str
    message: str
    details: ErrorCode | None = None


class ErrorReply(Shape):
    type: Literal["error"]
    error: ErrorDetails


class Block(Shape):
    """A piece of a message: a text, a thought, or a call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class Usage(Shape):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]


class End(Shape):
    stop_reason: StopReason | None  # None while it goes on
    stop_sequence: str | None


class Message(End):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    usage: Usage


class MessageStart(Shape):
    type: Literal["message_start"]
    message: Message


class BlockStart(Shape):
    type: Literal["content_block_start"]
    index: int
    content_block: Block


class Delta(Shape):
    type: Literal["text_delta", "thinking_delta", "input_json_delta"]
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None


class BlockDelta(Shape):
    type: Literal["content_block_delta"]
    index: int
    delta: Delta


class BlockStop(Shape):
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(Shape):
    type: Literal["message_delta"]
    delta: End
    usage: Usage


class MessageStop(Shape):
    type: Literal["message_stop"]


EVENTS = (MessageStart, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop)


class TokenCount(Shape):
    input_tokens: int


class ModelEntry(Shape):
    id: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: int | None
    max_tokens: int | None


class ModelList(Shape):
    data: list[ModelEntry]
    has_more: bool
    first_id: str | None
    last_id: str | None
