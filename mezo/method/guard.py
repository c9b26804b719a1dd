"""A guard against steps that leap: none is much longer than those before it."""

import dataclasses
import math
import statistics
from collections import deque

from mezo.method.step import Update

WINDOW, LEAST = 100, 20  # steps that a length is compared with, and how many there must be


class StepGuard:
    """Shortens a step to so many times the median length of the last ones; a function of the log alone.

    The length of a step is sqrt(sum_k coefficients_k^2), to which |sum_k coefficients_k z_k| is proportional on average
    (E|sum_k c_k z_k|^2 = d sum_k c_k^2 in d dimensions). One bad batch then moves theta little further than the others,
    where a fixed bound would have to be known before the run. Steps that change nothing do not count.

    Args:
        ratio: how much longer than the median a step may be, > 1; 0 never shortens one.

    >>> guard = StepGuard(3.0)
    >>> for _ in range(LEAST):
    ...     guard.see(Update((7,), (0.5,)))
    >>> guard.shorten(Update((8,), (-4.0,)))
    (Update(seeds=(8,), coefficients=(-1.5,), decay=1.0, lr=None, skipped=False), 0.375)
    """

    def __init__(self, ratio: float):
        self.ratio, self.lengths = ratio, deque(maxlen=WINDOW)

    def see(self, update: Update) -> None:
        """Count the update of a step, as it was made and logged."""
        if (length := length_of(update)) > 0:
            self.lengths.append(length)

    def shorten(self, update: Update) -> tuple[Update, float]:
        """The update to make of a planned one, and what it was multiplied by: 1 where it is short enough."""
        if not self.ratio or len(self.lengths) < LEAST:
            return update, 1.0
        length, longest = length_of(update), self.ratio * statistics.median(self.lengths)
        if length <= longest:
            return update, 1.0
        factor = longest / length
        return dataclasses.replace(update, coefficients=tuple(factor * c for c in update.coefficients)), factor


def length_of(update: Update) -> float:
    """sqrt(sum_k coefficients_k^2).

    >>> length_of(Update((7, 8), (3.0, -4.0)))
    5.0
    """
    return math.hypot(*update.coefficients)
