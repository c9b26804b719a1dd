"""The calibration batch: examples of the training set that what is frozen of an adapter is made from."""

import functools
from collections.abc import Sequence

from mezo.models.calibration import Pass
from mezo.models.parts import ModelParts
from mezo.progress import waiting
from mezo.runtimes.reference import reference_log_probs
from mezo.runtimes.rows import Row, RowBatch

EXAMPLES = 64


def calibrate(parts: ModelParts, rows: Sequence[Sequence[Row]], pad: int) -> None:
    """Make what is frozen beside theta from what the model computes of some training examples, if it is made so.

    The examples lie at equal distances in the training set, so they follow from it alone, whatever its order; a row is
    run at a time, without padding, by the model's own forward pass. Where no key or value depends on what is trained,
    an adapter changes scores at the scored positions alone, and only these count.

    Args:
        parts: the model, at a theta at which it is the base: zeros.
        rows: of each training example.
        pad: token id of padding, of which there is none.
    Raises:
        UserError: these rows have too few directions.
    """
    if parts.attached.calibrate is None:
        return
    chosen = [row for i in evenly(len(rows), EXAMPLES) for row in rows[i]]
    with waiting("computing what stays as it is of the adapter, from a few examples"):
        parts.attached.calibrate(_pass_of(row, parts, pad) for row in chosen)


def _pass_of(row: Row, parts: ModelParts, pad: int) -> Pass:
    batch = RowBatch.of([row], pad, next(iter(parts.params.values())).device)
    read = row.positions if parts.kv_depends is None else None
    return Pass(functools.partial(reference_log_probs, parts.model, batch), len(row.ids), read)


def evenly(n: int, most: int) -> list[int]:
    """At most so many of n numbers, at equal distances.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    count = min(n, most)
    return [i * n // count for i in range(count)]
