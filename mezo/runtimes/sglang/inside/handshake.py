"""How an engine's processes know the trainer that started them, and what both sides call things.

The trainer leaves a token in the environment and, for as long as the engine starts, the same token in a file that its
user alone can read: a process that finds the variable later, in another engine, does not find the file.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = "MEZO_ENGINE"
"""Variable of an engine's processes: process id of the trainer, token and scratch directory, divided by colons."""
TOKEN = "token"
"""File in the scratch directory that holds the token."""
ENDED = "ended"
"""File in the scratch directory that says that the trainer has done with the engine."""
METHOD = "mezo_"
"""Begins the names under which the engine is asked for methods of `Worker`."""


@contextmanager
def handshake(scratch: Path) -> Iterator[dict[str, str]]:
    """In the trainer: the environment variables of an engine that is started meanwhile.

    Args:
        scratch: directory of this engine, which holds no token yet.
    """
    token, path = secrets.token_hex(16), scratch / TOKEN
    with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(token)
    try:
        yield {ENVIRONMENT: f"{os.getpid()}:{token}:{scratch}"}
    finally:
        path.unlink()


def started_by_trainer() -> bool:
    """True in a child process of the engine that a trainer is starting right now."""
    trainer, token, scratch = _variable()
    if not token or trainer == str(os.getpid()):
        return False
    try:
        return (Path(scratch) / TOKEN).read_text() == token
    except OSError:
        return False


def scratch_directory() -> Path:
    """In a process of an engine: where the trainer that started it keeps the engine's files."""
    return Path(_variable()[2])


def _variable() -> tuple[str, str, str]:
    """Process id of the trainer, token and scratch directory, as the environment has them; "" of what is not there."""
    trainer, _, rest = os.environ.get(ENVIRONMENT, "").partition(":")
    token, _, scratch = rest.partition(":")
    return trainer, token, scratch
