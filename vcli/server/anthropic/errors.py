"""What goes wrong, as Anthropic's clients read it: `{"type": "error", "error": {"type": ..., "message": ...}}`."""

from typing import Any

import msgspec

from vcli.server.protocol import ApiError


def body(error: ApiError) -> bytes:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told: dict[str, Any] = {"type": kind, "message": str(error)}
    if error.code:
        told["details"] = {"error_code": error.code}
    return msgspec.json.encode({"type": "error", "error": told})


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
