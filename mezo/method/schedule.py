"""How the learning rate goes over a run."""

import math


def learning_rate(step: int, steps: int, lr: float, schedule: str = "constant", warmup_steps: int = 0) -> float:
    """lr of a step: a linear rise over the first warmup_steps, then constant, a line or half a cosine down to 0.

    The formulas of transformers' schedules of these names, in which step 0 of a warm-up has lr 0. A pure function of
    the step, so a run resumes anywhere; the log holds the coefficients that came of it.

    Args:
        step: from 0.
        steps: of the run.
        lr: greatest learning rate.
        schedule: "constant", "linear" or "cosine".
        warmup_steps: of the rise, at most `steps`.

    >>> [learning_rate(step, 4, 1.0, "linear") for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [round(learning_rate(step, 6, 1.0, "cosine", 2), 3) for step in range(6)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
