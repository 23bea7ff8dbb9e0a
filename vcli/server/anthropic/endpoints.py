"""Anthropic's Messages API: a message is generated as a chat completion is, and told in its own words."""

from typing import Any

import msgspec
from starlette.types import Scope

from vcli.server.anthropic.protocol import MessagesRequest
from vcli.server.anthropic.replies import MessagesReply
from vcli.server.chat import Prompt
from vcli.server.generation import ChatCompletions
from vcli.server.protocol import ChatRequest
from vcli.server.replies import Reply

RENAMED = {  # parameters of a chat
    r"stop\b": "stop_sequences",
    r"response_format(\.json_schema)?\b": "output_config.format",
    r"(tools\[\d+\])\.function\.parameters\b": r"\1.input_schema",
    r"(tools\[\d+\])\.function\b": r"\1",
}


class Messages(ChatCompletions):
    decoder = msgspec.json.Decoder(MessagesRequest)
    their_names = RENAMED

    async def generation_request(self, asked: MessagesRequest, scope: Scope) -> ChatRequest:
        return asked.generation_request()

    async def reply(self, asked: Any, request: ChatRequest, prompts: list[Prompt], n: int) -> Reply:
        return MessagesReply(request, **self.common(prompts, n))
