"""The calibration batch: examples of the training set that what is frozen of an adapter is made from."""

import functools
import random
from collections.abc import Sequence

from mezo.models.calibration import Pass
from mezo.models.parts import ModelParts
from mezo.progress import waiting
from mezo.runtimes.reference import model_log_probs
from mezo.runtimes.rows import Row, RowBatch


def calibrate(parts: ModelParts, rows: Sequence[Sequence[Row]], pad: int) -> None:
    """Make what is frozen beside theta from what the model computes of some training examples, if it is made so.

    Which examples depends on their number alone, so the result follows from data and model, not from a run's seed. A
    row is run at a time, without padding, by the model's own forward pass. Only the scored positions count: at the
    others, the first token above all, activations are far larger and tell little of a score.

    Args:
        parts: the model, at a theta at which it is the base: zeros.
        rows: of each training example.
        pad: token id of padding, of which there is none.
    Raises:
        UserError: these rows have too few directions.
    """
    calibration = parts.attached.calibration
    if calibration is None:
        return
    chosen = [row for i in some_of(len(rows), calibration.examples) for row in rows[i]]
    with waiting(f"calibrating lora_A on {len(chosen)} prompts"):
        calibration.run(_pass_of(row, parts, pad) for row in chosen)


def _pass_of(row: Row, parts: ModelParts, pad: int) -> Pass:
    batch = RowBatch.of([row], pad, next(iter(parts.params.values())).device)
    return Pass(functools.partial(model_log_probs, parts.model, batch), len(row.ids), row.positions or None)


def some_of(n: int, most: int) -> list[int]:
    """At most so many of n numbers, in order, as a generator of fixed seed chooses them.

    Not at equal distances: labels that take turns in a file would then leave a class out.

    >>> some_of(10, 4), some_of(3, 4)
    ([0, 2, 6, 9], [0, 1, 2])
    """
    return sorted(random.Random(0).sample(range(n), min(n, most)))
