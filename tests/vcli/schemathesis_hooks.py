"""How schemathesis is to judge this server, beyond its own checks: loaded by it where SCHEMATHESIS_HOOKS names this."""

import itertools
import re
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response

# The words of errors about one field by itself: what they are about, a schema can say.
OF_ONE_FIELD = re.compile(r"^[a-z_]+ (must|is required|holds)\b")
# But for the model's own limits, mixed lists, how two fields go together, and that 1.0 is no whole number.
BEYOND_A_SCHEMA = re.compile(
    r"got float$|tokens are 0 to |dimensions must be between 1 and|min_tokens must lie between 0 and max_tokens"
    r"|min_tokens must be 0 beside|bad_words must not hold an empty string"  # of spaces
    r"|truncate_prompt_tokens must be|best_of must be between n"
    r"|messages must hold at least one message"  # that is more than redacted thoughts
    r"|must be a string, a list of strings, a list of token ids or a list of such lists"
)


STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
number = itertools.count()


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """Valid bodies ask for the model that there is and for short answers, every second one for a stream."""
    if _is_valid(case) and isinstance(case.body, dict):
        case.body.pop("model", None)
        name = "max_output_tokens" if case.operation.path == "/v1/responses" else "max_tokens"
        case.body[name] = min(case.body.get(name) or 3, 3)  # where there is no such field, it is ignored
        if case.operation.path in STREAMED and next(number) % 2:
            case.body["stream"] = True


@schemathesis.check
def valid_data_is_served(ctx: CheckContext, response: Response, case: Case) -> None:
    """Unless for a reason that no schema can say."""
    if _is_valid(case) and response.status_code == 400:
        message = response.json()["error"]["message"]
        is_told = OF_ONE_FIELD.search(message) is None or BEYOND_A_SCHEMA.search(message) is not None
        assert is_told, f"valid data was refused: {message}"


def _is_valid(case: Case) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive
