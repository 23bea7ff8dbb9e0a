"""Mistakes that a person can mend."""


class UserError(Exception):
    """A bad flag, file or request. The message says what is wrong, the value seen and what to do."""
