"""How an engine's processes know the trainer that started them."""

import os
from pathlib import Path

ENVIRONMENT = "MEZO_ENGINE"


ENDED = "ended"  # file beside the token, written when the trainer ends the engine


def directory() -> Path:
    """Where the process that started this one's engine keeps its files."""
    return Path(os.environ[ENVIRONMENT].split(":", 2)[2])


def started_by_trainer() -> bool:
    """True in a child process of the engine that a trainer is starting right now."""
    trainer, _, rest = os.environ.get(ENVIRONMENT, "").partition(":")
    token, _, directory = rest.partition(":")
    if not token or trainer == str(os.getpid()):
        return False
    try:
        return (Path(directory) / "token").read_text() == token
    except OSError:
        return False
