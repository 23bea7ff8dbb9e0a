"""Mistakes that a person can mend, the end of one request alone, and the end of all of them."""


class UserError(Exception):
    """A bad flag, file or request. The message says what is wrong, the value seen and what to do."""


class RequestFailedError(Exception):
    """One request cannot be answered, and no other is concerned. The message is for its client, `code` for programs."""

    code = "request_failed"


class GrammarFailedError(RequestFailedError):
    """The rules that a client made for its answer leave nothing to draw, or became too complex on the way."""

    code = "grammar_failed"

    def __init__(self, num_output_tokens: int, reason: str) -> None:
        super().__init__(
            f"the grammar of the answer fails at its token {num_output_tokens + 1:,}: {reason}; make it simpler, or "
            "loosen what else limits the tokens"
        )


class InvalidEmbeddingError(RequestFailedError):
    """The model made NaN or infinite hidden states of a prompt."""

    code = "invalid_embedding"

    def __init__(self) -> None:
        super().__init__(
            "the model's hidden states of this prompt are NaN or infinite, so there is no embedding: try another "
            "prompt; if it happens often the weights are damaged, or too large for --dtype"
        )


class InvalidLogitsError(RequestFailedError):
    """The model gave a request NaN or infinite logits: no token can be drawn from them."""

    code = "invalid_logits"

    def __init__(self, num_output_tokens: int) -> None:
        super().__init__(
            f"the model's logits for token {num_output_tokens + 1:,} of the answer are NaN or infinite, so the request "
            "ends here: try another prompt; if it happens often the weights are damaged, or too large for --dtype"
        )


class EngineDeadError(Exception):
    """The engine process is gone for good, and with it every request that it had; the message says why."""
