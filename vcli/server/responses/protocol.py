"""What clients may ask of /v1/responses, and the conversation that it is.

A request becomes a ChatRequest: from there on it is served as any conversation. What always holds: an item or a
parameter that would change the answer and cannot be honoured is refused by name; what only tags a request is ignored.
"""

from typing import Annotated, Any, Literal

import msgspec

from vcli.server.protocol import ApiError, ChatMessage, ChatRequest, Function, Int, Tool, unsupported

MAX_METADATA = 16  # OpenAI's limits
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


class InputItem(msgspec.Struct, omit_defaults=True):
    """One item of a conversation as clients send it and as the server stores it; which fields count says its type."""

    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: str | None = None  # of a message
    content: str | list[dict[str, Any]] | None = None  # of a message, or the text of reasoning
    summary: list[dict[str, Any]] | None = None  # of reasoning
    call_id: str | None = None  # of a call and of its output
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None


class TextFormat(msgspec.Struct, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, omit_defaults=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct, omit_defaults=True):
    effort: str | None = None
    summary: str | None = None


class FunctionTool(msgspec.Struct, omit_defaults=True):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, omit_defaults=True):
    """One function, or (`allowed_tools`) only some of the tools."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[FunctionTool] | None = None


class InputTokensRequest(msgspec.Struct, kw_only=True):
    """What decides a prompt. None is 'not given': OpenAI's clients may send null for anything."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's extra
    # refused unless empty
    prompt: Any = None
    conversation: Any = None
    context_management: Any = None


class ResponsesRequest(InputTokensRequest, kw_only=True):
    """What decides the answer, too."""

    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    max_output_tokens: Int | None = None
    include: list[str] | None = None
    top_logprobs: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    # vLLM's extras
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    skip_special_tokens: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def has_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])

    @property
    def items(self) -> list[InputItem]:
        """The input, item by item."""
        return [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def check(self) -> None:
        """Raises ApiError for what would otherwise be silently ignored."""
        for name in ("prompt", "conversation", "context_management"):
            if value := getattr(self, name):
                raise unsupported(name, value)
        if self.truncation not in (None, "disabled"):
            raise unsupported("truncation", self.truncation)
        if self.background and not self.is_stored:
            raise ApiError(400, "background: true needs store: true, or nobody could get the answer", param="store")
        if not self.input:
            raise ApiError(400, "input must hold some text or at least one item", param="input")
        metadata = self.metadata or {}
        if (
            len(metadata) > MAX_METADATA
            or any(len(key) > MAX_METADATA_KEY for key in metadata)
            or any(len(value) > MAX_METADATA_VALUE for value in metadata.values())
        ):
            message = (
                f"metadata may have {MAX_METADATA} entries with keys of {MAX_METADATA_KEY} and values of "
                f"{MAX_METADATA_VALUE} characters at most"
            )
            raise ApiError(400, message, param="metadata")

    def as_conversation(self, before: list[InputItem], owner: str) -> "Conversation":
        """The conversation that asks the same. before: the items that went before the input. Raises ApiError."""
        items = before + self.items
        messages = as_messages(items, len(before))
        if self.instructions:
            messages.insert(0, ChatMessage(role="system", content=self.instructions))
        given = {name: value for name in _SHARED if (value := getattr(self, name)) is not None}
        return Conversation(
            items=items,
            owner=owner,
            stream=self.stream or self.background,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.has_logprobs or None,
            response_format=_response_format(self.text),
            tools=[_chat_tool(tool, index) for index, tool in enumerate(self.tools or [])] or None,
            tool_choice=self._chat_tool_choice(),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            **given,
        )

    def _chat_tool_choice(self) -> str | dict[str, Any] | None:
        choice = self.tool_choice
        if not isinstance(choice, ToolChoice):
            return choice
        if choice.type == "function":
            return {"type": "function", "function": {"name": choice.name}}
        allowed = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools or []]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": allowed}}


_SHARED = sorted(
    (set(ResponsesRequest.__struct_fields__) & set(ChatRequest.__struct_fields__)) - {"stream", "tools", "tool_choice"}
)


class RetrieveQuery(msgspec.Struct):
    """Of GET /v1/responses/{id}."""

    stream: bool = False
    starting_after: Annotated[int, msgspec.Meta(ge=0, le=10**9)] | None = None


class ItemsQuery(msgspec.Struct):
    """Of GET /v1/responses/{id}/input_items."""

    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20


class Conversation(ChatRequest, kw_only=True):
    """What a request for a response asks, with what went before, and whose it is."""

    items: list[InputItem]
    owner: str


def as_messages(items: list[InputItem], num_before: int = 0) -> list[ChatMessage]:
    """Items as messages of a chat: what an assistant thought, said and called, one after the other, is one message.

    Raises ApiError for items of other kinds, named by their place in the input, which `num_before` others precede.
    """
    messages: list[ChatMessage] = []
    for index, item in enumerate(items):
        param = f"input[{index - num_before}]"
        last = messages[-1] if messages and messages[-1].role == "assistant" else None
        if item.type == "message":
            text = _text(item.content, param)
            if item.role == "assistant" and last and last.content is None and last.tool_calls is None:
                last.content = text
            else:
                messages.append(ChatMessage(role=_role(item, param), content=text))
        elif item.type == "reasoning":
            thought = _text(item.content or item.summary, param)
            if thought:
                messages.append(ChatMessage(role="assistant", reasoning_content=thought))
        elif item.type == "function_call":
            call = _chat_tool_call(item, param)
            if last is None:
                messages.append(ChatMessage(role="assistant", tool_calls=[call]))
            elif last.tool_calls is None:
                last.tool_calls = [call]
            else:
                last.tool_calls.append(call)
        elif item.type == "function_call_output":
            if not item.call_id:
                raise ApiError(400, f"{param}: a function_call_output needs the call_id of its call", param=param)
            output = _text(item.output, param)
            messages.append(ChatMessage(role="tool", content=output, tool_call_id=item.call_id))
        else:
            message = f"{param}: this server knows no items of type {item.type[:40]!r}"
            raise ApiError(400, message, param=f"{param}.type", code="unsupported_value")
    return messages


def shown(item: InputItem, index: int) -> dict[str, Any]:
    """An item of the input as clients get it back: whole, with an id."""
    if item.type == "message" and not isinstance(item.content, list):
        kind = "output_text" if item.role == "assistant" else "input_text"
        item = msgspec.structs.replace(item, content=[{"type": kind, "text": item.content or ""}])
    return {"type": item.type, "id": f"item_{index}", "status": "completed"} | msgspec.to_builtins(item)


_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _text(content: str | list[dict[str, Any]] | None, param: str) -> str:
    """The text of an item's parts. Raises ApiError for parts that hold no text."""
    if not isinstance(content, list):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        field = "refusal" if part.get("type") == "refusal" else "text"
        if part.get("type") not in (*_TEXTS, "refusal"):
            kind, param = str(part.get("type"))[:40], f"{param}.content[{number}]"
            raise ApiError(400, f"{param}: this model reads text only, got a part of type {kind!r}", param=param)
        if not isinstance(part.get(field), str):
            param = f"{param}.content[{number}]"
            raise ApiError(400, f"{param}: needs a string in its field {field}", param=param)
        texts.append(part[field])
    return "".join(texts)


def _role(item: InputItem, param: str) -> str:
    if item.role in ("user", "assistant", "system", "developer"):
        return item.role
    shown_role = "nothing" if item.role is None else repr(item.role[:40])
    message = f"{param}: a message is from user, assistant, system or developer, got {shown_role}"
    raise ApiError(400, message, param=f"{param}.role")


def _chat_tool_call(item: InputItem, param: str) -> dict[str, Any]:
    if not item.name or not item.call_id:
        raise ApiError(400, f"{param}: a function_call needs a name and a call_id", param=param)
    try:
        arguments = msgspec.json.decode(item.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        shown_arguments = repr((item.arguments or "")[:80])
        message = f"{param}: the arguments of a function_call are the text of a JSON object, got {shown_arguments}"
        raise ApiError(400, message, param=f"{param}.arguments") from None
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}


def _chat_tool(tool: FunctionTool, index: int) -> Tool:
    param = f"tools[{index}]"
    if tool.type != "function":
        message = f"{param}: this server has no tools of its own, got type {tool.type[:40]!r}: it knows functions only"
        raise ApiError(400, message, param=f"{param}.type", code="unsupported_value")
    if not tool.name:
        raise ApiError(400, f"{param}: a function needs a name", param=f"{param}.name")
    return Tool(Function(tool.name, tool.description, tool.parameters, tool.strict))


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    """What the text has to be, as the chat API says it."""
    asked = text.format if text else None
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "json_object"}
    if asked.schema is None:
        raise ApiError(400, "text.format: a json_schema needs its schema", param="text.format.schema")
    schema = msgspec.to_builtins(asked)
    del schema["type"]
    return {"type": "json_schema", "json_schema": {"name": "response"} | schema}
