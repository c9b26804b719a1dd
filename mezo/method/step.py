"""What a step does to theta."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepUpdate:
    """theta <- theta * decay - sum_k coefficients[k] z(seeds[k]), or what a rule with state makes of it.

    Args:
        seeds, coefficients, decay: see above. With `lr` the sum is the estimate of the gradient, unscaled.
        lr: learning rate, where the rule applies it; else None, and the coefficients hold it.
        skipped: nothing is changed, a rule's state neither.
    """

    seeds: Sequence[int] = ()
    coefficients: Sequence[float] = ()
    decay: float = 1.0
    lr: float | None = None
    skipped: bool = False


def update_of(record) -> StepUpdate:
    """What a record of the log does to theta."""
    return StepUpdate(record.seeds, record.coefficients, record.decay, record.lr, record.skipped)


def passes(updates: Sequence) -> list[tuple]:
    """Step updates as updates of `mezo_kernels.step_`: each decays theta, then adds its directions.

    >>> passes([StepUpdate([7], [0.5], decay=0.9), StepUpdate([8], [0.25])])
    [(0, 0.0, 0.9), (7, 0.5), (8, 0.25)]
    """
    made = []
    for update in updates:
        if update.decay != 1:
            made.append((0, 0.0, update.decay))
        made += zip(update.seeds, update.coefficients, strict=True)
    return made
