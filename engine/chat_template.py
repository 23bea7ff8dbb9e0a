"""A conversation becomes a prompt by the model's own chat template.

Templates come with the model and are programs of a stranger: they run in jinja2's immutable sandbox and see plain data
only (strings, numbers, lists, dicts). That does not bound their time and memory: the server renders them in a process
of their own (vcli/server/templates.py). The helpers are the ones that Hugging Face's templates rely on.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    **kwargs: Any,
) -> str:
    """The prompt for these messages. Raises ValueError with the template's own words when it refuses them."""
    variables: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None, **kwargs}
    special_tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables |= {name: token for name, token in special_tokens.items() if token is not None}
    try:
        plain = msgspec.to_builtins(variables)
    except TypeError as error:
        raise ValueError(f"messages, tools and template arguments must be plain JSON data: {error}") from error
    try:
        return _compile(template).render(add_generation_prompt=add_generation_prompt, **plain)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not parse: {error.message} (line {error.lineno})") from error
    except MemoryError:
        raise ValueError("the chat template takes too much memory") from None
    except Exception as error:  # a template is a program: it can fail in any way that Python can
        raise ValueError(f"the chat template refused the conversation: {error}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block and not a bare scope: variables assigned inside must stay inside, as in training.
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes <, > and & for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
