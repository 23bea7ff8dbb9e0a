"""What clients may ask, as typed structs: OpenAI's parameters and vLLM's extras, checked before anything runs.

A body becomes a request struct and its SamplingParams, or an ApiError that names the parameter and the value. What
always holds: unknown fields are ignored, but a parameter that this server knows and cannot honour is refused, never
silently dropped.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl

import msgspec

from engine.sampling_params import MAX_LOGPROBS, MAX_N, SamplingParams

MAX_STOP_STRINGS = 64  # each is looked for after every token
MAX_STOP_LENGTH = 1024

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what msgpack can carry to the engine
Prompts = str | Sequence[str | Int | list[Int]]  # texts or token ids, one or several


class ApiError(Exception):
    """A request that gets an error reply, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same in the words of another API. names: what our parameters are called there, by regular expressions."""
        message = str(self)
        for ours, theirs in names.items():
            message = re.sub("^" + ours, theirs, message)
            self.param = re.sub("^" + ours, theirs, self.param) if self.param else None
        self.args = (message,)
        return self

    def body(self) -> bytes:
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both generation endpoints take. None is 'not given': OpenAI's clients may send null for anything."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    # vLLM's extras
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Int | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    # the form of the answer (structured.py)
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # refused unless empty (see `refuse_unsupported`)
    use_beam_search: Any = None

    def sampling_params(self, defaults: dict[str, float]) -> SamplingParams:
        """What the request says, and the model's own defaults where it says nothing. Raises ApiError."""
        given: dict[str, Any] = dict(defaults)
        given |= {name: value for name in _SHARED_NAMES if (value := getattr(self, name)) is not None}
        given["stop"] = self._stop_strings()
        given["logit_bias"] = self._logit_bias()
        given["max_tokens"] = self.output_limit()
        given["logprobs"] = self.num_logprobs()
        try:
            return SamplingParams(**given)
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split(" ", 1)[0]) from None

    @property
    def num_prompts(self) -> int:
        return 1

    def output_limit(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        return None

    def refuse_unsupported(self) -> None:
        """Raises ApiError for what would otherwise be silently ignored."""
        for name in _UNSUPPORTED_NAMES:
            if value := getattr(self, name, None):
                raise unsupported(name, value)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(
                400, "prompt_logprobs come with whole replies only, not with streams", param="prompt_logprobs"
            )

    def prompt_limit(self, max_model_len: int) -> int | None:
        """How many tokens, from its end, are taken of a prompt; None: it is not cut. Raises ApiError."""
        limit = self.truncate_prompt_tokens
        if limit == -1:
            return max(max_model_len - (self.output_limit() or 1), 1)
        if limit is not None and not 1 <= limit < max_model_len:
            message = (
                f"truncate_prompt_tokens must be -1 (what leaves room for max_tokens) or 1 to {max_model_len - 1:,}"
            )
            raise ApiError(400, f"{message}, got {limit:,}", param="truncate_prompt_tokens")
        return limit

    def _stop_strings(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP_STRINGS:
            raise ApiError(400, f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}", param="stop")
        if any(len(text) > MAX_STOP_LENGTH for text in stop):
            raise ApiError(400, f"stop must hold strings of at most {MAX_STOP_LENGTH} characters", param="stop")
        return stop

    def _logit_bias(self) -> dict[int, float] | None:
        try:
            return {int(token): bias for token, bias in self.logit_bias.items()} if self.logit_bias else None
        except ValueError:
            strange = next((token for token in self.logit_bias or {} if not re.fullmatch(r"\d{1,18}", token)), "")
            raise ApiError(
                400, f"logit_bias must map token ids, got key {strange[:40]!r}", param="logit_bias"
            ) from None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One message as the template sees it; fields of other kinds are dropped."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same by its newer name


class Function(msgspec.Struct, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None  # else what no grammar can keep is left out of the schema


class Tool(msgspec.Struct):
    """What the model may call."""

    function: Function
    type: Literal["function"] = "function"


class ChatRequest(GenerationRequest, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    chat_template: Any = None
    modalities: Any = None
    audio: Any = None

    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise ApiError(
                400, f"top_logprobs must be 0 to {MAX_LOGPROBS}, got {self.top_logprobs}", param="top_logprobs"
            )
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.modalities and self.modalities != ["text"]:
            raise unsupported("modalities", self.modalities)
        if not self.messages:
            raise ApiError(400, "messages must hold at least one message", param="messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message and add_generation_prompt exclude each other: set one of them",
                param="continue_final_message",
            )


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: Prompts
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: Any = None
    best_of: Int | None = None
    prompt_embeds: Any = None

    @property
    def drops_output(self) -> bool:
        """max_tokens 0 with echo: the client wants the prompt's log probabilities and nothing else."""
        return self.max_tokens == 0 and bool(self.echo)

    def output_limit(self) -> int | None:
        return 1 if self.drops_output else 16 if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling_params(self, defaults: dict[str, float]) -> SamplingParams:
        params = super().sampling_params(defaults)
        if self.echo and self.logprobs is not None and params.prompt_logprobs is None:
            params = msgspec.structs.replace(params, prompt_logprobs=self.logprobs)
        if self.best_of is not None and self.best_of > params.n:  # they are compared by their log probabilities
            params = msgspec.structs.replace(params, n=self.best_of, logprobs=params.logprobs or 0)
        return params

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        n = self.n or 1
        if self.best_of is not None and not n <= self.best_of <= MAX_N:
            raise ApiError(400, f"best_of must be between n ({n}) and {MAX_N}, got {self.best_of}", param="best_of")
        if self.best_of is not None and self.best_of > n and self.stream:
            raise ApiError(400, "best_of is known at the end only: leave stream or best_of out", param="best_of")

    @property
    def num_prompts(self) -> int:
        return len(self.prompts())

    def prompts(self) -> list[str | list[int]]:
        return split_prompts(self.prompt, "prompt")


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[Int]


_SHARED_NAMES = sorted(set(SamplingParams.__struct_fields__) & set(GenerationRequest.__struct_fields__))
_UNSUPPORTED_NAMES = (
    "use_beam_search",
    *("functions", "chat_template", "audio", "suffix", "prompt_embeds"),
)

Request = TypeVar("Request")


def split_prompts(given: Prompts, param: str) -> list[str | list[int]]:
    """One entry a prompt: its text or its token ids. Raises ApiError for an empty or mixed list."""
    if isinstance(given, str):
        return [given]
    types = set(map(type, given))  # of a million tokens, within milliseconds
    if types == {int}:
        return [given]  # type: ignore[list-item]
    if len(types) == 1:
        return given  # type: ignore[return-value]
    message = f"{param} must be a string, a list of strings, a list of token ids or a list of such lists"
    raise ApiError(400, message, param=param)


def decode(decoder: msgspec.json.Decoder[Request], body: bytes) -> Request:
    """A JSON body as a request struct. Raises ApiError(400) naming the field and what was wrong with it."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = _readable(str(error))
        raise ApiError(400, message, param=param) from None
    except RecursionError:
        raise ApiError(400, "the request body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}", code="invalid_json") from None


def convert_query(query: bytes, kind: type[Request]) -> Request:
    """What stands behind a path's question mark as a struct. Raises ApiError(400) as `decode` does."""
    try:
        return msgspec.convert(dict(parse_qsl(query.decode("latin-1"))), kind, strict=False)
    except msgspec.ValidationError as error:
        message, param = _readable(str(error))
        raise ApiError(400, message, param=param) from None


def decode_value(value: Any, kind: type[Request], param: str) -> Request:
    """A part of a request as its struct. Raises ApiError(400) naming the field and what was wrong with it."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, inner = _readable(str(error))
        where = f"{param}.{inner}" if inner else param
        raise ApiError(400, message if inner is None else f"{param}.{message}", param=where) from None


def unsupported(name: str, value: Any) -> ApiError:
    shown = msgspec.json.encode(value).decode()
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ApiError(
        400, f"{name} = {shown} is not supported by this server: leave it out", param=name, code="unsupported_value"
    )


def _readable(complaint: str) -> tuple[str, str | None]:
    """msgspec's complaint in our words, and the field it is about.

    "Expected `int | null`, got `str` - at `$.n`" -> "n must be int, got str", "n"
    """
    what, _, where = complaint.partition(" - at ")
    param = where.strip("`").removeprefix("$").removeprefix(".") or None
    if match := re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`", what):
        expected, got = match[1].replace(" | null", "").replace("array", "list"), match[2].replace("array", "list")
        return f"{param or 'the request body'} must be {expected}, got {got}", param
    if match := re.fullmatch(r"Object missing required field `([^`]*)`", what):
        return f"{match[1]} is required", f"{param}.{match[1]}" if param else match[1]
    return f"{param}: {what}" if param else what, param
