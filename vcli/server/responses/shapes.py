"""What /v1/responses answers, for the description at /openapi.json; see ../shapes.py."""

from typing import Any, Literal

from vcli.server.responses.protocol import FunctionTool, ReasoningConfig, TextFormat, ToolChoice
from vcli.server.shapes import ChatToken, Shape

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ContentPart(Shape):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[ChatToken] | None = None


class OutputItem(Shape):
    """A message, a thought (`reasoning`) or the call of a function; which fields there are says its type."""

    type: Literal["message", "reasoning", "function_call"]
    id: str
    status: ItemStatus
    role: Literal["assistant"] | None = None
    content: list[ContentPart] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class Item(Shape):
    """An item of the input, as it was sent."""

    type: str
    id: str
    status: str
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None


class Failure(Shape):
    code: str
    message: str


class Incomplete(Shape):
    reason: Literal["max_output_tokens"]


class InputDetails(Shape):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Shape):
    reasoning_tokens: int


class Usage(Shape):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Text(Shape):
    format: TextFormat


class Response(Shape):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: Failure | None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputItem]
    usage: Usage | None  # at the end
    background: bool
    store: bool
    previous_response_id: str | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: ReasoningConfig
    temperature: float
    top_p: float
    text: Text
    tool_choice: Literal["auto", "none", "required"] | ToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    truncation: Literal["disabled"]
    service_tier: Literal["default"]


class ResponseEvent(Shape):
    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: Response


class ItemEvent(Shape):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(Shape):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: ContentPart


class TextDelta(Shape):
    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatToken] | None = None


class TextDone(Shape):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatToken] | None = None


class ArgumentsDelta(Shape):
    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Shape):
    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


EVENTS = (ResponseEvent, ItemEvent, PartEvent, TextDelta, TextDone, ArgumentsDelta, ArgumentsDone)


class TokenCount(Shape):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(Shape):
    id: str
    object: Literal["response"]
    deleted: bool


class ItemPage(Shape):
    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
