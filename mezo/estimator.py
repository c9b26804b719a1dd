"""SPSA: two losses under one z give the derivative along z (Spall 1992; MeZO, arXiv 2305.17333, algorithm 1)."""

import math

LARGEST = 3.4028234663852886e38  # float32


def projected_grad(loss_plus: float, loss_minus: float, eps: float) -> float:
    """(loss_plus - loss_minus) / (2 eps): the estimate of z . grad loss, with an O(eps**2) bias.

    >>> projected_grad(1.5, 1.0, 0.25)
    1.0
    """
    return (loss_plus - loss_minus) / (2 * eps)


def coefficients(projected_grads: tuple[float, ...], lr: float) -> tuple[float, ...]:
    """c_k = (lr * projected_grad_k) / n of the update theta <- theta - sum_k c_k z_k, formed in float64.

    >>> coefficients((2.0, -4.0), lr=0.5)
    (0.5, -1.0)
    """
    return tuple(lr * g / len(projected_grads) for g in projected_grads)


def usable(numbers: tuple[float, ...]) -> bool:
    """True if every loss or coefficient is a finite float32; a step with one that is not must change nothing."""
    return all(math.isfinite(number) and abs(number) < LARGEST for number in numbers)
