"""Tools in a request: which of them may be called, and how the model hears of them and of what they gave.

A template that knows tools gets them as they are. For one that does not, they become text here: the tools a part of the
system message, calls the assistant's own words, results what the user says. What always holds: a request that names
a tool which is not there is refused before anything runs.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from vcli.server.dialects import CallFormat, Dialect
from vcli.server.protocol import ApiError, ChatRequest, Tool

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")


@dataclass(frozen=True)
class ToolUse:
    """What a request lets the model call."""

    tools: list[Tool]  # all that the request has
    must_call: bool = False
    may_repeat: bool = True  # several calls in one answer
    allowed: frozenset[str] | None = None  # the names of those that may be called; None: all

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for _, tool in self.callable_tools())

    def callable_tools(self) -> list[tuple[int, Tool]]:
        """Those that may be called, with their places in the request."""
        tools = enumerate(self.tools)
        return [(i, tool) for i, tool in tools if self.allowed is None or tool.function.name in self.allowed]


def tool_use(request: ChatRequest) -> ToolUse | None:
    """None: no tool may be called. Raises ApiError."""
    tools, choice = request.tools or [], request.tool_choice
    _check_tools(tools)
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools to choose from: send tools, too", param="tool_choice")
        return None
    may_repeat = request.parallel_tool_calls is not False
    match choice:
        case "none":
            return None
        case None | "auto":
            return ToolUse(tools, may_repeat=may_repeat)
        case "required":
            return ToolUse(tools, must_call=True, may_repeat=may_repeat)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolUse(tools, must_call=True, may_repeat=False, allowed=_among(tools, [name]))
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": ("auto" | "required") as mode, "tools": list(allowed)},
        }:
            names = _among(tools, [_name_of(each) for each in allowed])
            return ToolUse(tools, mode == "required", may_repeat, names) if names else None
    message = 'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    raise ApiError(400, f"{message}, got {json.dumps(choice)[:80]}", param="tool_choice")


def _check_tools(tools: list[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools must hold at most {MAX_TOOLS}, got {len(tools)}", param="tools")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name, param = tool.function.name, f"tools[{index}].function.name"
        if not _NAME.fullmatch(name):
            rule = "must be 1 to 128 letters, digits and _ . : / -"
            raise ApiError(400, f"{param} {rule}, got {name[:40]!r}", param=param)
        if name in seen:
            raise ApiError(400, f"{param}: there is a tool called {name!r} already", param=param)
        seen.add(name)


def _name_of(allowed: Any) -> str:
    match allowed:
        case {"function": {"name": str(name)}}:
            return name
    raise ApiError(400, f"tool_choice: no tool is named by {json.dumps(allowed)[:80]}", param="tool_choice")


def _among(tools: list[Tool], names: list[str]) -> frozenset[str]:
    """These names, which must be some of the tools'. Raises ApiError."""
    known = {tool.function.name for tool in tools}
    for name in names:
        if name not in known:
            raise ApiError(400, f"tool_choice names {name[:80]!r}, which is not among tools", param="tool_choice")
    return frozenset(names)


def template_tools(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates know them."""
    return [{"type": "function", "function": _described(tool)} for tool in tools]


def _described(tool: Tool) -> dict[str, Any]:
    function = tool.function
    described = {"name": function.name, "description": function.description, "parameters": schema_of(tool)}
    return {key: value for key, value in described.items() if value is not None}


def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, which are an object."""
    return {"type": "object", "properties": {}} | (tool.function.parameters or {})


def strict_schema_of(tool: Tool) -> dict[str, Any]:
    """What a call's arguments must be like: those that the tool has, and no others unless it says so."""
    schema = schema_of(tool)
    is_open = schema.keys() & {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
    return schema if is_open else schema | {"additionalProperties": False}


def conversation(messages: list[dict[str, Any]], tools: list[dict[str, Any]], dialect: Dialect) -> list[dict[str, Any]]:
    """Plain messages as the template reads them. Raises ApiError for calls that are none."""
    for index, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                _read_call(call, f"messages[{index}].tool_calls[{i}]") for i, call in enumerate(calls)
            ]
    if dialect.reads_tools:
        return messages
    plain: list[dict[str, Any]] = []
    for message in messages:
        message = _without_tools(message, dialect.call_format)
        is_result = message["role"] == "tool"
        if is_result and plain and plain[-1]["role"] == "tool":
            plain[-1]["content"] += "\n" + message["content"]  # of calls that were made together
        else:
            plain.append(message)
    for message in plain:
        if message["role"] == "tool":
            message["role"] = "user"  # whom every template knows
    return _with_instructions(plain, tools, dialect.call_format) if tools else plain


def _read_call(call: dict[str, Any], param: str) -> dict[str, Any]:
    """A call with its arguments as data: templates write them as JSON."""
    match call:
        case {"function": {"name": str(name), **rest}}:
            arguments = rest.get("arguments") or {}
            try:
                arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                read = {"type": "function", "function": {"name": name, "arguments": arguments}}
                return read | ({"id": call["id"]} if call.get("id") else {})
            param += ".function.arguments"
            raise ApiError(400, f"{param} must be a JSON object, or the text of one", param=param)
    raise ApiError(400, f"{param} must have a function with a name", param=param)


def _without_tools(message: dict[str, Any], form: CallFormat) -> dict[str, Any]:
    """A message of a conversation with tools as one without."""
    message = dict(message)
    if calls := message.pop("tool_calls", None):
        functions = [call["function"] for call in calls]
        written = form.write([(each["name"], json.dumps(each["arguments"], ensure_ascii=False)) for each in functions])
        message["content"] = "\n".join(filter(None, [message["content"], written]))
    if message["role"] == "tool":
        message["content"] = f"<tool_response>\n{message['content']}\n</tool_response>"
    return message


def _with_instructions(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], form: CallFormat
) -> list[dict[str, Any]]:
    """The conversation with the tools in its system message."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = form.write([("NAME", '{"ARGUMENT": VALUE}')])
    text = (
        f"You may call functions to help the user. These are their signatures:\n<tools>\n{lines}\n</tools>\n"
        f"To call one, write its name and its arguments as JSON like this:\n{example}\n"
        "Its result comes back to you between <tool_response> and </tool_response>."
    )
    if messages and messages[0]["role"] in ("system", "developer"):
        first, *others = messages
        return [first | {"content": f"{first['content']}\n\n{text}".lstrip()}, *others]
    return [{"role": "system", "content": text}, *messages]
