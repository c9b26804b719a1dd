"""Errors that are said in one line."""


class UserError(ValueError):
    """A mistake of the caller's: the message names the value, what was expected and the remedy."""


class RunError(RuntimeError):
    """A run cannot go on; its log is whole."""


class Diverged(RunError):
    """A run cannot go on for what its losses are: another lr or eps may get further."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
