"""The one exception type whose message is meant for the user's eyes."""


class GraincodeError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and what to type instead."""
