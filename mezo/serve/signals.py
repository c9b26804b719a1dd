"""Pause and resume of training by signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from mezo.serve.admission import Admission

PAUSES = {signal.SIGUSR1: True, signal.SIGUSR2: False}


@contextmanager
def pausing(admission: Admission) -> Iterator[None]:
    """SIGUSR1 holds training back meanwhile, SIGUSR2 lets it go on; in the main thread.

    A handler may interrupt this thread anywhere, so it takes no lock: who waits looks at the flag twice a second.
    """

    def handle(number: int, frame: object) -> None:
        admission.paused = PAUSES[signal.Signals(number)]

    before = {number: signal.signal(number, handle) for number in PAUSES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
