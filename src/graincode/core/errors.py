"""The one exception type whose message is meant for the user's eyes."""


class GraincodeError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and what to type instead."""

    @property
    def line(self) -> str:
        """The message alone: a worker process of a loader puts its traceback before it."""
        return str(self).strip().splitlines()[-1].removeprefix("graincode.core.errors.GraincodeError: ")
