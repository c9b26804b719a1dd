"""How many directions a step should have, by how far the gradients of its examples agree."""

SLACK = 1.1  # variance that fewer directions may have, over that of the most


def fewest(rho: float | None, batch_size: int, most: int) -> int:
    """The fewest directions, a divisor of `most`, whose estimate has at most a tenth more variance than with `most`.

    Examples whose gradients have the mean square s and the coherence rho (`mezo.training.instruments.coherence`) give m
    directions the variance d s ((1 - rho) / B + rho / m), in d parameters, up to a share of 1 / d. Where the gradients
    do not agree, rho = 0, it is the spread of the examples alone, which no number of directions lowers.

    Args:
        rho: coherence, at most 1; below 0, as an estimate may be, it counts as 0. None, not known, gives `most`.
        batch_size: B, examples of a step.
        most: directions that a step may have.

    >>> [fewest(rho, 32, 32) for rho in (None, 1.0, 0.02, 0.0, -0.1)]
    [32, 32, 8, 1, 1]
    """
    if rho is None:
        return most
    rho = max(rho, 0.0)
    variance = lambda m: (1 - rho) / batch_size + rho / m  # noqa: E731
    return next(m for m in range(1, most + 1) if most % m == 0 and variance(m) <= SLACK * variance(most))
