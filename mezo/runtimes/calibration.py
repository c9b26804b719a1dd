"""The calibration batch: examples of the training set that what is frozen of an adapter is made from."""

import functools
import random
from collections.abc import Sequence

from mezo.models.calibration import Pass
from mezo.models.parts import ModelParts
from mezo.progress import waiting
from mezo.runtimes.hf.reading import ByModel
from mezo.runtimes.reference import REFERENCE_ROWS, model_log_probs
from mezo.runtimes.rows import Row, RowBatch


def calibrate(parts: ModelParts, rows: Sequence[Sequence[Row]], pad: int) -> None:
    """Make what is frozen beside theta from what the model computes of some training examples, if it is made so.

    Which examples depends on their number alone, so the result follows from data and model, not from a run's seed. Rows
    of like length are run together by the model's own forward pass, which takes no logits but of the scored positions.
    Only these count: at the others, the first token above all, activations are far larger and tell little of a score.

    Args:
        parts: the model, at a theta at which it is the base: zeros.
        rows: of each training example.
        pad: token id of padding.
    Raises:
        UserError: these rows have too few directions.
    """
    calibration = parts.attached.calibration
    if calibration is None:
        return
    chosen = [row for i in some_of(len(rows), calibration.examples) for row in rows[i]]
    with waiting(f"calibrating lora_A on {len(chosen)} prompts"):
        calibration.run([_pass_of(group, parts, pad) for group in _groups(chosen)])


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of like length; each by itself where a decoder reads on, whose tokens are others."""
    size = 1 if any(row.decoder for row in rows) else REFERENCE_ROWS
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _pass_of(rows: Sequence[Row], parts: ModelParts, pad: int) -> Pass:
    batch = RowBatch.of(rows, pad, next(iter(parts.params.values())).device)
    length = batch.ids.shape[1]
    real = [i * length + at for i, row in enumerate(rows) for at in range(len(row.ids))]
    scored = [i * length + at for i, row in enumerate(rows) for at in row.positions if not row.decoder]
    if parts.scored_by == "model" and not parts.encoder_decoder and _below_head(parts):
        read = ByModel(parts).outputs
        run = functools.partial(read, batch.ids, batch.positions, attention_mask=batch.mask)
    else:
        run = functools.partial(model_log_probs, parts.model, batch)
    return Pass(run, len(rows) * length, tuple(real), tuple(scored) or tuple(real))


def _below_head(parts: ModelParts) -> bool:
    """Whether all that is trained lies in the body, whose inputs do not depend on which logits are taken."""
    return set(map(id, parts.params.values())) <= set(map(id, parts.body.parameters()))


def some_of(n: int, most: int) -> list[int]:
    """At most so many of n numbers, in order, as a generator of fixed seed chooses them.

    Not at equal distances: labels that take turns in a file would then leave a class out.

    >>> some_of(10, 4), some_of(3, 4)
    ([0, 2, 6, 9], [0, 1, 2])
    """
    return sorted(random.Random(0).sample(range(n), min(n, most)))
