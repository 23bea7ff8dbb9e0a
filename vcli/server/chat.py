"""What a client sends becomes token ids: texts, token ids, and conversations by the model's chat template.

Tokenizing runs in threads and templating in a process, because a long prompt takes longer than other requests may wait.
What always holds: a text that cannot fit in the context is refused before it is tokenized.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engine.tokenizer import Tokenizer
from vcli.server.dialects import Dialect, Marks
from vcli.server.parts import AnswerForm
from vcli.server.protocol import ApiError, ChatMessage, ChatRequest, TokenizeRequest, Tool
from vcli.server.templates import Templates
from vcli.server.tools import conversation, template_tools, tool_use

MAX_TOKEN_LENGTH = 256  # characters; no tokenizer has longer tokens, but for runs of one and the same character


@dataclass(frozen=True)
class Prompt:
    """A prompt on its way in: `text` is what the client wrote, or what the template made of it."""

    token_ids: list[int]
    text: str | None
    form: AnswerForm | None = None  # of its answer, where that may be more than text


def truncated(prompt: Prompt, limit: int | None) -> Prompt:
    """The last tokens of a prompt, if there are more than the limit."""
    if limit is None or len(prompt.token_ids) <= limit:
        return prompt
    return replace(prompt, token_ids=prompt.token_ids[-limit:], text=None)


def template_kwargs(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """What the request says to the template itself."""
    effort = request.reasoning_effort
    said = {} if effort is None else {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
    return said | (request.chat_template_kwargs or {})


def answer_form(dialect: Dialect, prompt: str, request: ChatRequest) -> AnswerForm | None:
    """What the answer to a rendered conversation may be made of. None: of text. Raises ApiError."""
    use, marks = tool_use(request), dialect.marks
    if use is None and marks is None:
        return None
    return AnswerForm(
        marks=marks,
        is_thinking=marks is not None and _is_thinking(marks, prompt, request),
        shows_reasoning=request.include_reasoning is not False,
        tools=use,
        call_format=dialect.call_format if use else None,
    )


def _is_thinking(marks: Marks, prompt: str, request: ChatRequest) -> bool:
    """Does the prompt end in the midst of thoughts?"""
    if not request.continue_final_message:
        return prompt.rstrip().endswith(marks.begin)
    last = _plain_message(request.messages[-1], len(request.messages) - 1)["content"]
    return marks.begin in last and marks.end not in last


async def encode_texts(
    tokenizer: Tokenizer, texts: list[str], max_model_len: int, *, add_special_tokens: bool
) -> list[Prompt]:
    """Raises ApiError for a text that is longer than the context in any case."""
    for text in texts:
        _check_length(len(text), max_model_len, "prompt")

    def encode() -> list[Prompt]:
        return [Prompt(tokenizer.encode(text, add_special_tokens), text) for text in texts]

    return await asyncio.to_thread(encode)


async def decode_tokens(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The text of known token ids. Raises ApiError for a token that the tokenizer does not have."""
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"token {wrong} does not exist: the tokenizer has {tokenizer.vocab_size:,} tokens")
    return await asyncio.to_thread(tokenizer.decode, token_ids, skip_special_tokens=False)


async def render(
    templates: Templates,
    messages: list[ChatMessage],
    tokenizer: Tokenizer,
    template: str | None,
    dialect: Dialect,
    *,
    tools: list[Tool],
    max_model_len: int,
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: dict[str, Any],
) -> str:
    """A conversation as the prompt that the model was trained on. Raises ApiError."""
    if template is None:
        raise ApiError(400, "the model has no chat template: use /v1/completions, or serve with --chat-template FILE")
    if len(messages) > max_model_len:  # each would be a token at least
        message = f"the conversation has {len(messages):,} messages and --max-model-len is {max_model_len:,} tokens"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    described = template_tools(tools)
    plain = [_plain_message(message, index) for index, message in enumerate(messages)]
    if "developer" not in template:  # OpenAI's newer word, which few templates know
        plain = [each | {"role": "system"} if each["role"] == "developer" else each for each in plain]
    plain = conversation(plain, described, dialect)
    _check_length(sum(len(message["content"]) for message in plain), max_model_len, "messages")
    if taken := sorted(_RESERVED & template_kwargs.keys()):
        raise ApiError(400, f"chat_template_kwargs must not set {taken[0]}", param="chat_template_kwargs")
    try:
        text = await templates.render(
            template,
            messages=plain,
            tools=described if described and dialect.reads_tools else None,
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            **template_kwargs,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    return _cut_after(text, plain[-1]["content"]) if continue_final_message and plain else text


def _check_length(num_characters: int, max_model_len: int, param: str) -> None:
    if num_characters > max_model_len * MAX_TOKEN_LENGTH:
        message = (
            f"prompt has {num_characters:,} characters and --max-model-len is {max_model_len:,} tokens: shorten it"
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")


_RESERVED = {"template", "messages", "add_generation_prompt", "bos_token", "eos_token", "tools"}


def _plain_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """The message as plain data, its content parts joined into one text. Raises ApiError for parts of other kinds."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    if isinstance(message.content, list):
        plain["content"] = "".join(_text_of(part, index) for part in message.content)
    if "reasoning" in plain:  # the templates know the older name
        plain.setdefault("reasoning_content", plain.pop("reasoning"))
    return {"content": "", **plain}


def _text_of(part: dict[str, Any], index: int) -> str:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    param = f"messages[{index}].content"
    kind = str(part.get("type"))[:40]
    if kind == "text":
        raise ApiError(400, f"{param}: a text part needs a string in its field text", param=param)
    raise ApiError(400, f"{param}: this model reads text only, got a part of type {kind!r}", param=param)


def _cut_after(text: str, last_content: str) -> str:
    """The prompt up to the end of the last message, so that the model goes on with it."""
    position = text.rfind(last_content.strip())
    if position < 0:
        raise ApiError(400, "the chat template changes the last message: it cannot be continued", param="messages")
    return text[: position + len(last_content.strip())]
