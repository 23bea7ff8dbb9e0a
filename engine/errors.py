"""Mistakes that a person can mend, and the end of one request alone."""


class UserError(Exception):
    """A bad flag, file or request. The message says what is wrong, the value seen and what to do."""


class RequestFailedError(Exception):
    """One request cannot be answered, and no other is concerned. The message is for its client, `code` for programs."""

    code = "request_failed"
