"""What Anthropic's clients ask of /v1/messages, as typed structs, and what of OpenAI's chat API asks the same.

Unknown fields are ignored (`metadata`, `service_tier`, `cache_control`: prefixes are cached anyway). What always holds:
what a block of a message says reaches the model, or the request is refused with the block's place.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from vcli.server import protocol
from vcli.server.protocol import ApiError, ChatMessage, ChatRequest, Int, unsupported

BLOCK_BREAK = "\n"  # between blocks of text, and between turns of one role


class Block(msgspec.Struct, tag_field="type", kw_only=True):
    """A piece of a message."""


class TextBlock(Block, tag="text"):
    text: str


class ImageBlock(Block, tag="image"):
    """Refused."""


class DocumentBlock(Block, tag="document"):
    source: dict[str, Any]  # refused unless it is of type text
    title: str | None = None
    context: str | None = None


class SearchResultBlock(Block, tag="search_result"):
    source: str
    title: str
    content: list[TextBlock | ImageBlock]  # of one kind alone, its `type` could be missing


class ThinkingBlock(Block, tag="thinking"):
    thinking: str


class RedactedThinkingBlock(Block, tag="redacted_thinking"):
    """Nothing that this server has written: it is left out."""


class ToolUseBlock(Block, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Passage = TextBlock | DocumentBlock | SearchResultBlock | ImageBlock  # read as text, if it is one


class ToolResultBlock(Block, tag="tool_result"):
    tool_use_id: str
    content: str | list[Passage] | None = None
    is_error: bool | None = None


AnyBlock = Passage | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class Tool(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None  # of the tool
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model is to think; how long it does (`budget_tokens`) is its own affair."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(msgspec.Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    format: JsonFormat | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """A conversation: all that its prompt is made of."""

    messages: list[InputMessage]
    model: str | None = None
    system: str | list[Passage] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # refused unless empty: without them another conversation would be answered
    thread: Any = None
    compaction: Any = None
    mcp_servers: Any = None

    def chat_request(self, **sampling: Any) -> ChatRequest:
        """What would ask the same as a chat completion. A last turn of the assistant is continued. Raises ApiError."""
        self._refuse_unsupported()
        messages = _chat_messages(self)
        is_continued = bool(messages) and messages[-1].role == "assistant"
        if is_continued and messages[-1].tool_calls:
            raise ApiError(400, "the last message calls tools: send their results after it")
        return ChatRequest(
            model=self.model,
            messages=messages,
            continue_final_message=is_continued,
            chat_template_kwargs={"enable_thinking": self.thinking.type != "disabled"} if self.thinking else None,
            include_reasoning=not (self.thinking and self.thinking.display == "omitted"),
            response_format=self._response_format(),
            tools=[_chat_tool(tool, index) for index, tool in enumerate(self.tools or [])] or None,
            tool_choice=self._tool_choice(),
            parallel_tool_calls=not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            **sampling,
        )

    def _refuse_unsupported(self) -> None:
        if self.thread:  # clients that read the code go on without
            message = "this server keeps no threads: send the whole conversation, without thread"
            raise ApiError(400, message, code="thread_unsupported_request")
        for name in ("compaction", "mcp_servers"):
            if value := getattr(self, name):
                raise unsupported(name, value)

    def _response_format(self) -> dict[str, Any] | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = {"name": "output", "schema": self.output_config.format.schema}
        return {"type": "json_schema", "json_schema": schema}

    def _tool_choice(self) -> str | dict[str, Any] | None:
        if self.tool_choice is None:
            return None
        if self.tool_choice.type != "tool":
            return {"auto": "auto", "any": "required", "none": "none"}[self.tool_choice.type]
        if self.tool_choice.name is None:
            raise ApiError(400, "tool_choice.name is required: it says which tool")
        return {"type": "function", "function": {"name": self.tool_choice.name}}


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: Int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None

    def generation_request(self) -> ChatRequest:
        """Raises ApiError."""
        return self.chat_request(
            max_tokens=self.max_tokens,
            stream=self.stream,
            stop=self.stop_sequences,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


def _chat_messages(request: CountTokensRequest) -> list[ChatMessage]:
    """The conversation with one message for each turn: turns of one role that follow each other are one."""
    messages: list[ChatMessage] = []
    if request.system:
        messages.append(ChatMessage("system", _text(request.system, "system")))
    for index, message in enumerate(request.messages):
        for each in _messages_of(message, f"messages[{index}].content"):
            before = messages[-1] if messages else None
            if before is not None and before.role == each.role != "tool":
                before.content = _joined(before.content, each.content)
                before.reasoning_content = _joined(before.reasoning_content, each.reasoning_content)
                before.tool_calls = [*(before.tool_calls or []), *(each.tool_calls or [])] or None
            else:
                messages.append(each)
    return messages


def _messages_of(message: InputMessage, where: str) -> Iterator[ChatMessage]:
    """A message for each block, to be joined."""
    blocks = [TextBlock(text=message.content)] if isinstance(message.content, str) else message.content
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if isinstance(block, Passage):
            yield ChatMessage(message.role, _passage(block, place))
        elif isinstance(block, ToolResultBlock):
            if message.role != "user":
                raise ApiError(400, f"{place}: a tool_result belongs into a message of the user")
            text = _text(block.content or "", f"{place}.content")
            yield ChatMessage("tool", f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)
        elif message.role != "assistant":
            kind = type(block).__struct_config__.tag
            raise ApiError(400, f"{place}: a block of type {kind!r} belongs into a message of the assistant")
        elif isinstance(block, ThinkingBlock):
            yield ChatMessage("assistant", reasoning_content=block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
            yield ChatMessage("assistant", tool_calls=[{"id": block.id, "type": "function", "function": function}])


def _text(content: str | Sequence[Passage], where: str) -> str:
    if isinstance(content, str):
        return content
    return BLOCK_BREAK.join(_passage(block, f"{where}[{index}]") for index, block in enumerate(content))


def _passage(block: Passage, where: str) -> str:
    """What a block says, behind what it is called. Raises ApiError for one that is no text."""
    match block:
        case TextBlock():
            return block.text
        case SearchResultBlock():
            return f"{block.title} ({block.source}){BLOCK_BREAK}{_text(block.content, f'{where}.content')}"
        case DocumentBlock(source={"type": "text", "data": str(data)}):
            return BLOCK_BREAK.join(filter(None, [block.title, block.context, data]))
    kind = type(block).__struct_config__.tag
    raise ApiError(400, f"{where}: this model reads text only, got a block of type {kind!r}")


def _joined(first: Any, second: Any) -> Any:
    """Two texts, each of which may be missing."""
    return BLOCK_BREAK.join(text for text in (first, second) if text) or None


def _chat_tool(tool: Tool, index: int) -> protocol.Tool:
    if tool.type not in (None, "custom"):
        raise ApiError(400, f"tools[{index}]: this server runs no tools, got one of type {tool.type[:80]!r}")
    if tool.input_schema is None:
        raise ApiError(400, f"tools[{index}].input_schema is required: a JSON schema of what the tool takes")
    return protocol.Tool(protocol.Function(tool.name, tool.description, tool.input_schema, tool.strict))
