"""The reply of /v1/messages: a message made of blocks, whole or as server-sent events.

A block is what follows each other of one kind: text, thoughts, or a call with its arguments. What always holds: the
blocks of a stream have the indices and contents that those of the whole message have.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.outputs import OutputDelta
from vcli.server.anthropic import errors
from vcli.server.parts import Arguments, CallBegun, Part, Reasoning
from vcli.server.protocol import ApiError, ChatRequest
from vcli.server.replies import StreamedReply, encode


@dataclass(slots=True)
class Block:
    """A block of the message."""

    start: dict[str, Any]  # it, while it is empty
    texts: list[str] = field(default_factory=list)  # of its parts, in a message that is sent whole

    @property
    def kind(self) -> str:
        return str(self.start["type"])

    def whole(self) -> dict[str, Any]:
        text = "".join(self.texts)
        return self.start | ({"input": _parsed(text)} if self.kind == "tool_use" else {self.kind: text})


class MessagesReply(StreamedReply):
    id_prefix = "msg_"

    def __init__(self, request: ChatRequest, **common: Any) -> None:
        super().__init__(**common)
        self.max_tokens = request.max_tokens
        self.blocks: list[Block] = []

    def whole(self) -> bytes:
        for part in self.whole_parts(self.choices[0]):
            self._put(part)
            self.blocks[-1].texts.append(_text_of(part))
        return encode(self._message([block.whole() for block in self.blocks]) | self._end() | {"usage": self._usage()})

    def head(self) -> bytes:
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        return _event("message_start", message=message)

    def event(self, prompt_index: int, delta: OutputDelta) -> bytes:
        choice = self.add(prompt_index, delta, keep=False)
        return b"".join([self._part_events(part) for part in self.parts(choice, delta)])

    def tail(self) -> bytes:
        return b"".join(
            [
                self._block_end(),
                _event("message_delta", delta=self._end(), usage=self._usage()),
                _event("message_stop"),
            ]
        )

    def error_event(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + errors.body(error) + b"\n\n"

    def _part_events(self, part: Part) -> bytes:
        events, end = [], self._block_end()
        is_new = self._put(part)
        index, block = len(self.blocks) - 1, self.blocks[-1]
        if is_new:
            events = [end, _event("content_block_start", index=index, content_block=block.start)]
        if text := _text_of(part):
            name, key = _DELTAS[block.kind]
            events.append(_event("content_block_delta", index=index, delta={"type": name, key: text}))
        return b"".join(events)

    def _block_end(self) -> bytes:
        return _event("content_block_stop", index=len(self.blocks) - 1) if self.blocks else b""

    def _put(self, part: Part) -> bool:
        """Begin another block if this part needs one. True then."""
        if isinstance(part, CallBegun):
            start: dict[str, Any] = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        elif isinstance(part, Arguments):
            return False  # of the call that has begun
        elif isinstance(part, Reasoning):
            start = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            start = {"type": "text", "text": ""}
        if start["type"] != "tool_use" and self.blocks and self.blocks[-1].kind == start["type"]:
            return False
        self.blocks.append(Block(start))
        return True

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}

    def _end(self) -> dict[str, Any]:
        """Why the message ended."""
        [choice] = self.choices
        sequence = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        if choice.finish_reason == "length":
            is_full = self.max_tokens is not None and choice.num_tokens >= self.max_tokens
            reason = "max_tokens" if is_full else "model_context_window_exceeded"
        elif sequence is not None:
            reason = "stop_sequence"
        elif choice.finish_reason == "tool_calls":
            reason = "tool_use"
        else:
            reason = "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        """So far. Tokens of the prompt that the prefix cache had are counted apart."""
        num_cached_tokens = sum(self.num_cached_tokens)
        return {
            "input_tokens": self.num_prompt_tokens - num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached_tokens,
            "output_tokens": self.num_output_tokens,
        }


_DELTAS = {  # of a block of a type: the delta's own type, and the field that holds its text
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


def _text_of(part: Part) -> str:
    return "" if isinstance(part, CallBegun) else part.text


def _parsed(arguments: str) -> Any:
    """The arguments of a call; those that max_tokens cut off cannot be read any more."""
    try:
        return msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return {}


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), encode({"type": name} | fields))
