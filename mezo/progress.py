"""Saying what a program is doing wherever a person may wait for it: what begins, how much there is, a line a minute.

Lines go to the logger "mezo". The command line shows them on standard error; a script that wants them does as much.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track

FIRST, EVERY = 5.0, 60.0  # seconds until the first estimate, and from one line to the next
WIDE = 1000  # columns of what is no terminal
log = logging.getLogger("mezo")
Item = TypeVar("Item")


def say(text: str) -> None:
    """Say what begins."""
    log.info(text)


def starting() -> None:
    """Say that a command has begun, unless its libraries are there already: to import them takes seconds."""
    if "torch" not in sys.modules:
        say("starting: importing torch and transformers")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Say what begins, and while it lasts, where there is no terminal, that it does: a line a minute.

    Args:
        text: what it is.
    """
    say(text)
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY):
            log.info("%s: still, after %s", text, lasting(time.monotonic() - began))

    if not sys.stderr.isatty():
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def console(stderr: bool = False, **options) -> Console:
    """rich's console; where there is no terminal its lines are as long as they are, and no table is cut.

    Args:
        stderr: write to standard error.
        options: others of rich's `Console`.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else WIDE, **options)


def told(items: Sequence[Item], what: str, first: float = FIRST) -> Iterator[Item]:
    """The items, with a word on how far they are: a bar in a terminal, else a line now and then.

    Args:
        items: each of which takes some time.
        what: is done with them.
        first: seconds until the first line.
    """
    if sys.stderr.isatty():
        yield from track(items, what, transient=True)
        return
    started, due = time.monotonic(), first
    for done, item in enumerate(items):
        seconds = time.monotonic() - started
        if done and seconds >= due:
            log.info(
                "%s: %d of %d, about %s left", what, done, len(items), lasting(seconds / done * (len(items) - done))
            )
            due = seconds + EVERY
        yield item


def lasting(seconds: float) -> str:
    """A time as a person says it.

    >>> lasting(0.4), lasting(59), lasting(90), lasting(5400)
    ('1 s', '59 s', '1 min 30 s', '1 h 30 min')
    """
    whole = max(1, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    parts = ((hours, "h"), (minutes, "min"), (0 if hours else whole % 60, "s"))
    return " ".join(f"{n} {unit}" for n, unit in parts if n)
