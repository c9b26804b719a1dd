"""FZOO: one-sided estimates along z of +1 and -1, over the standard deviation of their losses."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo.method.estimator import Losses
from mezo.method.rules.base import Rule


@dataclass(frozen=True)
class FZOO(Rule):
    """theta <- theta - lr g / sigma, g = sum_k (l_k - l_0) z_k / (n eps), from n + 1 forward passes.

    sigma^2 = sum_k (l_k - mean l)^2 / (n - 1) over the losses l_k at theta + eps z_k; l_0 is that at theta (Dang et al.
    2025, arXiv 2506.09034, as on the authors' page of the paper, dkmiyan.github.io/FZOO_hp). Their code, DKmiyan/FZOO,
    leaves eps out and takes the population's sigma: its lr is lr sqrt((n - 1) / n) / eps. A step moves a weight by
    about lr / (eps sqrt(n)). Where sigma is 0 nothing is changed.
    """

    name: ClassVar[str] = "fzoo"
    summary: ClassVar[str] = "FZOO (arXiv 2506.09034): n + 1 forward passes for n perturbations"
    distribution: ClassVar[str] = "rademacher"
    one_sided: ClassVar[bool] = True

    def refusals(
        self, *, num_perturbations: int = 1, weight_decay: float = 0.0, normalise_z: bool = False, z_score: bool = False
    ) -> Iterator[tuple[str, str]]:
        """See `Rule.refusals`."""
        if num_perturbations < 2:
            why = "the rule fzoo divides by the standard deviation of the perturbed losses"
            yield "num_perturbations", f"must be >= 2, got {num_perturbations}: {why}"
        if normalise_z:
            yield "normalise_z", "must be off: z of the rule fzoo is +1 or -1, of one length already"
        if z_score:
            yield "z_score_rewards", "must be off: the rule fzoo standardises its losses already"

    def scale(self, lr: float, losses: Losses) -> float | None:
        """lr / sigma."""
        sigma = deviation(losses.plus)
        return lr / sigma if sigma else None


def deviation(losses: Sequence[float]) -> float:
    """Sample standard deviation, from exact sums: 0 of equal losses and of no others; NaN where one is not finite.

    >>> deviation([0.1, 0.1, 0.1]), deviation([1.0, 3.0]) ** 2
    (0.0, 2.0000000000000004)
    """
    return statistics.stdev(losses) if all(map(math.isfinite, losses)) else math.nan
