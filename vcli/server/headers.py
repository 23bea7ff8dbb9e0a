"""What a request's headers say."""

from starlette.types import Scope

from vcli.server.protocol import ApiError

MAX_DIGITS = 9  # Python refuses to read thousands of them


def header(scope: Scope, name: str) -> bytes | None:
    """A header's value, None where there is none. name: in any case"""
    key = name.lower().encode()
    return next((value for each, value in scope["headers"] if each == key), None)


def milliseconds(scope: Scope, name: str, *, least: int, most: int) -> int | None:
    """The number of milliseconds in a header, None where there is none. Raises ApiError for another value."""
    value = header(scope, name)
    if value is None:
        return None
    if value.isdigit() and len(value) <= MAX_DIGITS and least <= int(value) <= most:
        return int(value)
    got = value[:40].decode("latin-1")
    raise ApiError(400, f"{name} must be a whole number of milliseconds from {least} to {most:,}, got {got!r}")
