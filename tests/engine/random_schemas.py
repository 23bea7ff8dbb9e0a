"""JSON schemas as people write them, drawn by chance: nested objects, enums, arrays, bounds, optional fields."""

import random
from typing import Any

NAMES = ["name", "age", "email", "city", "price", "status", "items", "tags", "address", "count", "id", "title", "notes"]
WORDS = ["red", "green", "blue", "small", "large", "open", "closed", "pending", "north", "south", "yes", "no"]
MAX_NESTING = 3


def random_schema(seed: int) -> dict[str, Any]:
    """An object, closed as OpenAI's strict mode has it; strings and arrays are bounded, so that answers end."""
    return _object(random.Random(seed), 0)


def _object(rng: random.Random, nesting: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 5 - nesting))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, nesting + 1) for name in names},
        "additionalProperties": False,
    }
    if required := [name for name in names if rng.random() < 0.7]:
        schema["required"] = required
    return schema


def _value(rng: random.Random, nesting: int) -> dict[str, Any]:
    kinds = [_string, _enum, _integer, _number, _boolean, _nullable, _pattern]
    nested = [_object, _array, _union]
    return rng.choice(kinds + (nested if nesting < MAX_NESTING else []))(rng, nesting)


def _string(rng: random.Random, nesting: int) -> dict[str, Any]:
    low = rng.choice([0, 0, 1, 3])
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 20)}


def _pattern(rng: random.Random, nesting: int) -> dict[str, Any]:
    patterns = [r"^[A-Z]{2}-\d{3}$", r"^\d{4}-\d{2}$", r"^(a|bc)+x?$", r"^[a-z]{1,8}@[a-z]{2,6}\.com$"]
    return rng.choice([{"type": "string", "pattern": rng.choice(patterns), "maxLength": 30}, _format(rng)])


def _format(rng: random.Random) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4", "date-time"])}


def _enum(rng: random.Random, nesting: int) -> dict[str, Any]:
    return {"enum": rng.sample([*WORDS, 1, 2.5, None, True, 'quo"te', "snow ☃"], rng.randint(1, 6))}


def _integer(rng: random.Random, nesting: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    high = low + rng.choice([0, 1, 7, 60, 5000])
    name = rng.choice(["maximum", "exclusiveMaximum"])
    bounds = {"minimum": low, name: high + (name == "exclusiveMaximum")}
    return {"type": "integer"} | rng.choice([bounds, bounds, {"minimum": low}, {"multipleOf": rng.choice([2, 5, 10])}])


def _number(rng: random.Random, nesting: int) -> dict[str, Any]:
    low = round(rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.choice([0.5, 3.0, 100.0]), 2)}


def _boolean(rng: random.Random, nesting: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _nullable(rng: random.Random, nesting: int) -> dict[str, Any]:
    return {"type": ["string", "null"], "maxLength": 12}


def _array(rng: random.Random, nesting: int) -> dict[str, Any]:
    low = rng.choice([0, 0, 1, 2])
    return {
        "type": "array",
        "items": _value(rng, nesting + 1),
        "minItems": low,
        "maxItems": low + rng.randint(0, 3),
    }


def _union(rng: random.Random, nesting: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, nesting + 1) for _ in range(rng.randint(2, 3))]}
