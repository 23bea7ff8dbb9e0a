"""What clients get: the engine's deltas in the shape of an API, whole or as server-sent events.

Here is what all shapes have in common; OpenAI's two older ones are in choices.py, the others with their APIs. What
always holds: the token counts that a client is told are the engine's.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.messages import TokenLogprob
from engine.outputs import OutputDelta, PromptLogprobs
from engine.tokenizer import Tokenizer
from vcli.server.chat import Prompt
from vcli.server.parts import Markup, Parser, Part, Reasoning, Text
from vcli.server.protocol import ApiError

encode = msgspec.json.Encoder().encode


@dataclass
class Choice:
    """One sequence of the reply, as far as it got. A streamed reply keeps its number of tokens only."""

    prompt: Prompt
    parser: Parser | None = None  # of an answer that may be more than text
    has_started: bool = False  # the event with its role, or its echo, is sent
    num_tokens: int = 0
    text_offset: int = 0  # characters of the tokens with log probabilities so far
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Reply(ABC):
    """The reply to one call: `n` choices for each prompt, prompt by prompt. Each API shapes it in its own way.

    It is sent whole: `add` for each delta, and then `whole`.
    """

    id_prefix: str

    def __init__(self, model: str, prompts: list[Prompt], n: int, tokenizer: Tokenizer | None) -> None:
        self.id = self.id_prefix + uuid.uuid4().hex
        self.model = model
        self.created = int(time.time())
        self.prompts = prompts
        self.n = n
        self.tokenizer = tokenizer
        self.choices = [
            Choice(prompt, None if prompt.form is None else Parser(prompt.form)) for prompt in prompts for _ in range(n)
        ]
        self.prompt_logprobs: list[PromptLogprobs | None] = [None] * len(prompts)
        self.num_cached_tokens = [0] * len(prompts)

    def add(self, prompt_index: int, delta: OutputDelta, *, keep: bool) -> Choice:
        """Take note of a delta; a reply that is sent whole keeps all of it."""
        choice = self.choices[prompt_index * self.n + delta.index]
        choice.num_tokens += len(delta.token_ids)
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.index == 0 and delta.num_cached_tokens:
            self.num_cached_tokens[prompt_index] = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[prompt_index] = delta.prompt_logprobs
        if keep:
            choice.texts.append(delta.text)
            choice.token_ids += delta.token_ids
            choice.logprobs += delta.logprobs or []
        return choice

    def parts(self, choice: Choice, delta: OutputDelta) -> list[Part]:
        """What a delta shows of a choice, which may be less than its text or more; at the end, why it ended."""
        if choice.parser is None:
            return [Text(delta.text)] if delta.text else []
        return self._shown(choice, choice.parser, delta.text, is_last=delta.finish_reason is not None)

    def whole_parts(self, choice: Choice) -> list[Part]:
        """The parts of a choice all of whose text was kept."""
        text = "".join(choice.texts)
        return [Text(text)] if choice.parser is None else self._shown(choice, choice.parser, text, is_last=True)

    def _shown(self, choice: Choice, parser: Parser, text: str, *, is_last: bool) -> list[Part]:
        parts = parser.add(text)
        if is_last:
            parts += parser.finish()
            if parser.num_calls and choice.finish_reason == "stop":
                choice.finish_reason = "tool_calls"
        hidden = Markup if parser.form.shows_reasoning else Markup | Reasoning
        return [part for part in parts if not isinstance(part, hidden)]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @abstractmethod
    def whole(self) -> bytes:
        """The reply in one piece."""

    def token_logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """Tokens as OpenAI's newer APIs show them: each with its likeliest rivals."""
        return [
            self._token(token.token_id, token.logprob)
            | {"top_logprobs": [self._token(token_id, logprob) for token_id, logprob in token.top]}
            for token in logprobs
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = b"" if self.tokenizer is None else self.tokenizer.token_bytes(token_id)
        return {"token": self._token_text(token_id), "logprob": finite(logprob), "bytes": list(token_bytes)}

    def _token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.tokenizer is None else self.tokenizer.token_text(token_id)


class StreamedReply(Reply):
    """A reply that can be sent as events, too: `head`, `event` for each delta, and `tail` or `error_event`."""

    def head(self) -> bytes:
        """The events before the first delta."""
        return b""

    @abstractmethod
    def event(self, prompt_index: int, delta: OutputDelta) -> bytes:
        """A delta as server-sent events; none where it says nothing to the client yet."""

    @abstractmethod
    def tail(self) -> bytes:
        """The events behind the last delta."""

    @abstractmethod
    def error_event(self, error: ApiError) -> bytes:
        """The last event of a stream that failed."""


def finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no minus infinity
