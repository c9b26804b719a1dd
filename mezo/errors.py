"""Errors that are said in one line."""


class UserError(ValueError):
    """A mistake of the caller's: the message names the value, what was expected and the remedy."""


class RunError(RuntimeError):
    """A run cannot go on; its log is whole."""


class Diverged(RunError):
    """A run cannot go on for what its losses are: another lr or eps may get further."""


class Terminated(SystemExit):
    """A signal asked this process to end; its exit code is that of a shell, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
