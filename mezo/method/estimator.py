"""SPSA: two losses under one z give the derivative along z (Spall 1992; MeZO, arXiv 2305.17333, algorithm 1)."""

import statistics
from dataclasses import dataclass


def projected_grad(loss_plus: float, loss_minus: float, half_distance: float) -> float:
    """(loss_plus - loss_minus) / (2 half_distance): the estimate of z . grad loss, with an O(eps**2) bias.

    Args:
        loss_plus: at theta + eps z.
        loss_minus: at theta - eps z, or at theta itself.
        half_distance: half the way, in units of z, between the two thetas: eps, or eps / 2 where one is theta. The
            one-sided difference is the two-sided one about theta + eps/2 z: its error is O(eps) in each estimate,
            eps/2 z . Hz, though even in z, so that its product with z has mean zero.

    >>> projected_grad(1.5, 1.0, 0.25)
    1.0
    """
    return (loss_plus - loss_minus) / (2 * half_distance)


@dataclass(frozen=True)
class Losses:
    """Losses of a batch at the perturbed copies of a step, one item a perturbation.

    Args:
        plus: at theta + eps z.
        minus: at theta - eps z; under a one-sided rule at theta itself, the same number for each; under a rule that
            guides the mean of plus, likewise.
    """

    plus: tuple[float, ...]
    minus: tuple[float, ...]

    def projected_grads(self, half_distance: float) -> tuple[float, ...]:
        """`projected_grad` of each perturbation.

        >>> Losses((1.5,), (1.0,)).projected_grads(0.25)
        (1.0,)
        """
        return tuple(projected_grad(*pair, half_distance) for pair in zip(self.plus, self.minus, strict=True))

    def against_mean(self) -> "Losses":
        """The losses at theta + eps z against their own mean, where theta is scored nowhere else.

        The mean is that of the exact sum, so equal losses are equal to it.

        >>> Losses((1.0, 2.0, 6.0), (0.0,) * 3).against_mean().minus
        (3.0, 3.0, 3.0)
        """
        return Losses(self.plus, (statistics.mean(self.plus),) * len(self.plus))

    @property
    def mean(self) -> float:
        """Mean over both signs of all perturbations."""
        return sum(self.plus + self.minus) / (2 * len(self.plus))
