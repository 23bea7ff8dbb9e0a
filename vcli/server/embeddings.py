"""/v1/embeddings: prompts as vectors, made of the served model's hidden states.

A call is a completion that asks for no tokens: it comes in by the same door and runs in the same batches.
"""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.types import Scope

from engine.outputs import OutputDelta
from engine.sampling_params import Pooling, SamplingParams, pooling_params
from vcli.server.chat import Prompt
from vcli.server.generation import Completions
from vcli.server.protocol import ApiError, CompletionRequest, Int, Prompts, split_prompts
from vcli.server.replies import Choice, Reply, encode


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """OpenAI's parameters, and vLLM's extras below. None is 'not given'."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None  # the first so many numbers of each vector
    pooling: Pooling | None = None
    normalize: bool | None = None  # to length 1, unless it is false
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    priority: Int | None = None
    cache_salt: str | None = None

    @property
    def stream(self) -> bool:
        return False


class PooledCompletion(CompletionRequest, kw_only=True):
    """The completion that gives no tokens."""

    pooling: Pooling

    def sampling_params(self, defaults: dict[str, float]) -> SamplingParams:
        return pooling_params(self.pooling)


class Embeddings(Completions):
    decoder = msgspec.json.Decoder(EmbeddingRequest)

    async def generation_request(self, asked: EmbeddingRequest, scope: Scope) -> PooledCompletion:
        from engine.embeddings import check_dimensions  # numpy takes its time

        ready = self.service.require_ready()
        try:
            check_dimensions(asked.dimensions, ready.hidden_size)
        except ValueError as error:
            raise ApiError(400, str(error), param="dimensions") from None
        return PooledCompletion(
            model=asked.model,
            prompt=split_prompts(asked.input, "input"),
            pooling=asked.pooling or ready.default_pooling,
            add_special_tokens=asked.add_special_tokens,
            truncate_prompt_tokens=asked.truncate_prompt_tokens,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
        )

    async def reply(self, asked: EmbeddingRequest, request: Any, prompts: list[Prompt], n: int) -> Reply:
        return EmbeddingReply(asked, **self.common(prompts, n))


class EmbeddingReply(Reply):
    """One vector for each prompt; it is never streamed."""

    id_prefix = "embd-"

    def __init__(self, asked: EmbeddingRequest, **common: Any) -> None:
        super().__init__(**common)
        self.asked = asked
        self.vectors = [b""] * len(self.prompts)

    def add(self, prompt_index: int, delta: OutputDelta, *, keep: bool) -> Choice:
        self.vectors[prompt_index] = delta.embedding or b""
        return super().add(prompt_index, delta, keep=keep)

    def whole(self) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": self._shaped(vector)}
            for index, vector in enumerate(self.vectors)
        ]
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "total_tokens": self.num_prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens)},
        }
        return encode({"id": self.id, "object": "list", "model": self.model, "data": data, "usage": usage})

    def _shaped(self, pooled: bytes) -> Sequence[float] | str:
        from engine.embeddings import finish_embedding

        asked = self.asked
        vector = finish_embedding(pooled, dimensions=asked.dimensions, normalize=asked.normalize is not False)
        if asked.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        values: list[float] = vector.tolist()
        return values
