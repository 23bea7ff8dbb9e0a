"""A response as clients get it: an object that grows item by item, and the events that say how.

What an answer is made of comes as parts (parts.py): thoughts become a reasoning item, text a message, and each call a
function_call. What always holds: `body` is the response as far as the events have told it, and events are numbered from
0 in the order in which they are made.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.outputs import OutputDelta
from vcli.server.parts import Arguments, CallBegun, Part, Reasoning, Text
from vcli.server.protocol import ApiError
from vcli.server.replies import Choice, StreamedReply, encode
from vcli.server.responses.protocol import ResponsesRequest


@dataclass
class OutputItem:
    """One item of the output, as far as it got."""

    kind: str  # message, reasoning or function_call
    index: int
    call_id: str = ""
    name: str = ""
    status: str = "in_progress"
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_ID_PREFIXES[self.kind]}_{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, *, is_empty: bool = False) -> dict[str, Any]:
        """The one content part of a message or of reasoning."""
        text = "" if is_empty else self.text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if is_empty else self.logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def body(self) -> dict[str, Any]:
        head = {"type": self.kind, "id": self.id, "status": self.status}
        content = [] if self.status == "in_progress" and not self.texts else [self.part()]
        if self.kind == "message":
            return head | {"role": "assistant", "content": content}
        if self.kind == "reasoning":
            return head | {"summary": [], "content": content}
        return head | {"call_id": self.call_id, "name": self.name, "arguments": self.text}


_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_DELTA_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class ResponseReply(StreamedReply):
    """The reply to one call of /v1/responses."""

    id_prefix = "resp_"

    def __init__(
        self,
        asked: ResponsesRequest,
        on_change: Callable[["ResponseReply"], None],
        defaults: dict[str, float],
        **common: Any,
    ) -> None:
        """on_change: called when the response begins to be made in the background, and when it is done.

        defaults: the model's own sampling parameters.
        """
        super().__init__(**common)
        self.asked = asked
        self.status = "queued" if asked.background else "in_progress"
        self._on_change = on_change
        self._settings = settings(asked, defaults)
        self._items: list[OutputItem] = []
        self._news: list[bytes] = []  # the events of the last delta
        self._logprobs: list[dict[str, Any]] = []  # of tokens that have made no text yet
        self._num_events = 0
        self._num_reasoning_tokens = 0
        self._error: dict[str, Any] | None = None
        self._incomplete: dict[str, Any] | None = None
        self._completed_at: int | None = None

    @property
    def is_done(self) -> bool:
        return self.status not in ("queued", "in_progress")

    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": self._completed_at,
            "status": self.status,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "model": self.model,
            "output": [item.body() for item in self._items],
            "usage": self._usage() if self.is_done else None,
        } | self._settings

    def json(self) -> bytes:
        return encode(self.body())

    def add(self, prompt_index: int, delta: OutputDelta, *, keep: bool) -> Choice:
        choice = super().add(prompt_index, delta, keep=False)
        self._news = list(self._grow(choice, delta))
        return choice

    def whole(self) -> bytes:
        return self.json()

    def head(self) -> bytes:
        names = ["created", "queued"] if self.asked.background else ["created", "in_progress"]
        events = b"".join([self._event(f"response.{name}", response=self.body()) for name in names])
        if self.asked.background:
            self._on_change(self)
        return events

    def event(self, prompt_index: int, delta: OutputDelta) -> bytes:
        self.add(prompt_index, delta, keep=False)
        return b"".join(self._news)

    def tail(self) -> bytes:
        if not self.is_done:  # OpenAI has no event that says that a response was cancelled: its stream ends
            return b"".join(self._end("cancelled"))
        return self._event(f"response.{self.status}", response=self.body())

    def error_event(self, error: ApiError) -> bytes:
        self._error = {"code": error.code or "server_error", "message": str(error)}
        events = [*self._end("failed"), self._event("response.failed", response=self.body())]
        return b"".join(events)

    # How it grows.

    def _grow(self, choice: Choice, delta: OutputDelta) -> Iterator[bytes]:
        """Take in a delta; the events that say so."""
        if self.status == "queued":
            self.status = "in_progress"
            yield self._event("response.in_progress", response=self.body())
        parts = self.parts(choice, delta)
        if any(isinstance(part, Reasoning) for part in parts):
            self._num_reasoning_tokens += len(delta.token_ids)
        if self.asked.has_logprobs:
            self._logprobs += self.token_logprobs(delta.logprobs or [])
        for part in parts:
            yield from self._take(part)
            self._logprobs = []
        if delta.finish_reason == "length":
            self._incomplete = {"reason": "max_output_tokens"}
            yield from self._end("incomplete")
        elif delta.finish_reason is not None:
            yield from self._end("completed")

    def _take(self, part: Part) -> Iterator[bytes]:
        if isinstance(part, CallBegun):
            yield from self._open(OutputItem("function_call", len(self._items), part.id, part.name))
        elif isinstance(part, Arguments):
            yield self._delta(part.text)
        elif isinstance(part, Text | Reasoning):
            kind = "message" if isinstance(part, Text) else "reasoning"
            if not self._items or self._items[-1].kind != kind:
                yield from self._open(OutputItem(kind, len(self._items)))
            if part.text:
                yield self._delta(part.text, self._logprobs if kind == "message" else [])

    def _open(self, item: OutputItem) -> Iterator[bytes]:
        yield from self._close("completed")
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=item.index, item=item.body())
        if item.kind != "function_call":
            yield self._item_event("response.content_part.added", part=item.part(is_empty=True))

    def _delta(self, text: str, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        item = self._items[-1]
        item.texts.append(text)
        item.logprobs += logprobs or []
        more = {"logprobs": logprobs or []} if item.kind == "message" else {}
        return self._item_event(f"{_DELTA_EVENTS[item.kind]}.delta", delta=text, **more)

    def _close(self, status: str) -> Iterator[bytes]:
        """End the last item, if there is one that is open."""
        if not self._items or (item := self._items[-1]).status != "in_progress":
            return
        name, item.status = f"{_DELTA_EVENTS[item.kind]}.done", status
        if item.kind == "function_call":
            yield self._item_event(name, name=item.name, arguments=item.text)
        else:
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            yield self._item_event(name, text=item.text, **more)
            yield self._item_event("response.content_part.done", part=item.part())
        yield self._event("response.output_item.done", output_index=item.index, item=item.body())

    def _end(self, status: str) -> Iterator[bytes]:
        if not self._items and status in ("completed", "incomplete"):
            yield from self._open(OutputItem("message", 0))  # the answer is empty
        yield from self._close("completed" if status == "completed" else "incomplete")
        self.status = status
        self._completed_at = int(time.time()) if status == "completed" else None
        self._on_change(self)

    # Words of it.

    def _item_event(self, event: str, **fields: Any) -> bytes:
        """About the last item, or its one content part."""
        item = self._items[-1]
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind != "function_call":
            place["content_index"] = 0
        return self._event(event, **place, **fields)

    def _event(self, event: str, **fields: Any) -> bytes:
        data = encode({"type": event, "sequence_number": self._num_events} | fields)
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (event.encode(), data)

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": sum(self.num_cached_tokens), "cache_write_tokens": 0},
            "output_tokens": self.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
        }


def settings(asked: ResponsesRequest, defaults: dict[str, float]) -> dict[str, Any]:
    """What was asked, as the response repeats it."""

    def or_else(value: Any, default: Any) -> Any:
        return default if value is None else value

    return {
        "background": bool(asked.background),
        "store": asked.is_stored,
        "previous_response_id": asked.previous_response_id,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "reasoning": msgspec.to_builtins(asked.reasoning) if asked.reasoning else {"effort": None, "summary": None},
        "temperature": or_else(asked.temperature, defaults.get("temperature", 1.0)),
        "top_p": or_else(asked.top_p, defaults.get("top_p", 1.0)),
        "text": {
            "format": {"type": "text"}
            | msgspec.to_builtins(asked.text.format if asked.text and asked.text.format else {})
        },
        "tool_choice": msgspec.to_builtins(asked.tool_choice or "auto"),
        "tools": msgspec.to_builtins(asked.tools or []),
        "top_logprobs": asked.top_logprobs or 0,
        "truncation": "disabled",
        "service_tier": "default",
    }
