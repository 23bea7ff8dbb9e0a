"""The server's description of itself, OpenAPI 3.2: made of the routes as they are, and of the structs that bodies are
decoded into. What always holds: a client's route that is not described is no part of the API.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.sampling_params import MAX_ALLOWED, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP_IDS
from vcli.server.protocol import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from vcli.server.shapes import ErrorReply
from vcli.version import version

_TO_UNDERSCORE = str.maketrans(dict.fromkeys("/{}.-", "_"))

Shapes = type | tuple[type, ...]  # several: any of them
TEXT = "text/plain"

ANY = (401, 403)  # what each operation may answer
READS = (400, 408, 413)  # and one with a body

_ERRORS = {
    400: "The request is wrong: `error.message` says what, and `error.param` where.",
    401: "The API key is missing or wrong.",
    403: "This key, or a web page of this origin, may not.",
    404: "There is nothing by this name.",
    408: "The body did not come in time.",
    409: "Not in this state.",
    413: "The body is too large.",
    422: "A request like this one ended the engine, and is refused for some minutes.",
    429: "Too much is waiting, or the key's limits are reached: `Retry-After` says when to come again.",
    500: "The server or the model failed on this request.",
    503: "The model is loading, the server shuts down, or the answer would be late: `Retry-After` says when to come.",
}


_STOP_TEXT = {"minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOP = {**_STOP_TEXT, "maxItems": MAX_STOP_STRINGS, "items": _STOP_TEXT}
_LOGPROBS = {"minimum": 0, "maximum": MAX_LOGPROBS}
_PENALTY = {"minimum": -2, "maximum": 2}
# What SamplingParams and the requests refuse beyond the types of their fields, by the field's name.
_LIMITS: dict[str, dict[str, Any]] = {
    "n": {"minimum": 1, "maximum": MAX_N},
    "best_of": {"minimum": 1, "maximum": MAX_N},
    "truncate_prompt_tokens": {"minimum": -1},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_k": {"minimum": -1},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "logit_bias": {
        "propertyNames": {"pattern": r"^[0-9]{1,18}$"},
        "additionalProperties": {"minimum": -100, "maximum": 100},
        "maxProperties": MAX_LOGIT_BIAS,
    },
    "stop": _STOP,
    "stop_sequences": _STOP,
    "stop_token_ids": {"maxItems": MAX_STOP_IDS, "items": {"minimum": 0}},
    "allowed_token_ids": {"minItems": 1, "maxItems": MAX_ALLOWED, "items": {"minimum": 0}},
    "bad_words": {"maxItems": MAX_BAD_WORDS, "items": {"minLength": 1}},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "dimensions": {"minimum": 1},
}
NOT_EMPTY = {"minLength": 1, "minItems": 1}


@dataclass(frozen=True)
class Doc:
    """What a client must know of a route."""

    summary: str
    gives: Shapes | str  # the reply of 200; a string is a media type
    takes: type | None = None  # the struct that its body is decoded into
    limits: Mapping[str, dict[str, Any]] | None = None  # what is refused of its fields beyond their types
    query: type | None = None  # the struct of what stands behind the question mark
    event: Shapes | None = None  # of server-sent events, where a reply may be streamed
    ends_with_done: bool = False  # the last event is [DONE]
    also: Mapping[int, type] | None = None  # replies of other statuses that are no errors in the usual shape
    errors: Sequence[int] = ()
    error: Shapes = ErrorReply
    names: Mapping[str, str] | None = None  # what its reply names for paths of other routes: parameter, JSON pointer
    is_public: bool = False  # needs no API key
    example: Mapping[str, Any] | None = None  # a body that is served


class Operation(Route):
    """A route that is described."""

    def __init__(
        self, method: Literal["GET", "POST", "DELETE"], path: str, endpoint: Callable[..., Any], doc: Doc
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.method, self.doc = method, doc
        self.operation_id = f"{method.lower()}{self.path_format}".translate(_TO_UNDERSCORE).strip("_")


def describe(operations: Sequence[Operation], *, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI description of some routes, as JSON would have it. has_keys: clients need an API key."""
    structs = list(dict.fromkeys(struct for each in operations for struct in _structs(each.doc)))
    schemas, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(structs, schemas, strict=True))
    for doc in [each.doc for each in operations]:
        if doc.takes is not None:
            properties = _resolve(schema_of[doc.takes], components)["properties"]
            limits = {**_LIMITS, **(doc.limits or {})}
            properties |= {name: _merged(schema, limits.get(name, {})) for name, schema in properties.items()}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        operation = _operation(each, schema_of, components, has_keys)
        if links := _links(each.doc, operations):
            operation["responses"]["200"]["links"] = links
        paths.setdefault(each.path_format, {})[each.method.lower()] = operation
    description: dict[str, Any] = {
        "openapi": "3.2.0",
        "info": {"title": "vcli", "version": version()},
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_keys:
        keys = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        description["components"]["securitySchemes"] = keys
        description["security"] = [{name: []} for name in keys]
    return description


def openapi_route(operations: Sequence[Operation], *, has_keys: bool) -> Operation:
    """The route that gives the description of all of these, and of itself."""
    bodies: list[bytes] = []

    async def openapi(request: Request) -> Response:
        if not bodies:  # made when somebody asks first
            bodies.append(msgspec.json.encode(describe([*operations, route], has_keys=has_keys)))
        return Response(bodies[0], media_type="application/json")

    route = Operation("GET", "/openapi.json", openapi, Doc("This description.", gives=dict, is_public=True))
    return route


def _structs(doc: Doc) -> list[type]:
    gives = () if isinstance(doc.gives, str) else _each(doc.gives)
    asked = (*_each(doc.takes), *_each(doc.query))
    return [*asked, *gives, *_each(doc.event), *_each(doc.error), *(doc.also or {}).values()]


def _each(shapes: Shapes | None) -> tuple[type, ...]:
    return shapes if isinstance(shapes, tuple) else () if shapes is None else (shapes,)


def _operation(
    route: Operation, schema_of: Mapping[type, Any], components: Mapping[str, Any], has_keys: bool
) -> dict[str, Any]:
    doc = route.doc
    shape = partial(_any_of, schema_of=schema_of)
    errors = {*ANY, *doc.errors} | ({*READS} if doc.takes else set())
    responses = {status: _reply(_ERRORS[status], _json(shape(doc.error))) for status in sorted(errors)}
    responses |= {status: _reply(_ERRORS[status], _json(shape(struct))) for status, struct in (doc.also or {}).items()}
    content = {doc.gives: {"schema": {"type": "string"}}} if isinstance(doc.gives, str) else _json(shape(doc.gives))
    if doc.event is not None:
        content["text/event-stream"] = {"itemSchema": _event(shape((*_each(doc.event), *_each(doc.error))), doc)}
    responses[200] = _reply("As asked.", content)
    operation: dict[str, Any] = {
        "operationId": route.operation_id,
        "summary": doc.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in route.param_convertors
        ],
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    if doc.query is not None:
        operation["parameters"] += _query_parameters(_resolve(schema_of[doc.query], components))
    if doc.takes is not None:
        body = {"schema": schema_of[doc.takes]} | ({"example": doc.example} if doc.example else {})
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if has_keys and doc.is_public:
        operation["security"] = []
    return operation


def _links(doc: Doc, operations: Sequence[Operation]) -> dict[str, Any]:
    """Where the names in a reply lead."""
    return {
        each.operation_id: {"operationId": each.operation_id, "parameters": {name: f"$response.body#{pointer}"}}
        for name, pointer in (doc.names or {}).items()
        for each in operations
        if name in each.param_convertors
    }


def _merged(schema: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(schema[key], limits[key]) for key in schema.keys() & limits if isinstance(limits[key], dict)}
    return schema | limits | both


def _any_of(shapes: Shapes, schema_of: Mapping[type, Any]) -> dict[str, Any]:
    schemas = [schema_of[each] for each in _each(shapes)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _reply(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}


def _event(schema: dict[str, Any], doc: Doc) -> dict[str, Any]:
    """One server-sent event whose data is JSON."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"anyOf": [{"properties": {"data": {"const": "[DONE]"}}}, event]} if doc.ends_with_done else event


def _query_parameters(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": each}
        for name, each in schema["properties"].items()
    ]


def _resolve(schema: dict[str, Any], components: Mapping[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = components[schema["$ref"].rsplit("/", 1)[1]]
    return resolved
