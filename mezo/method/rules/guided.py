"""A guiding vector: the contrast of the directions of low and of high loss, then one antithetic pair along it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo.method.estimator import Losses, projected_grad
from mezo.method.rules.base import Rule
from mezo.method.step import Update
from mezo.ranges import Share


@dataclass(frozen=True)
class Guided(Rule):
    """theta <- theta decay - lr g v with g = (l(theta + eps v) - l(theta - eps v)) / (2 eps) and v = sum_k w_k z_k.

    w_k = 1 / a for the a directions of the least l(theta + eps z_k), -1 / (n - a) for the others, a = floor(elite_share
    n): MeZO-GV (Jin, Cen and Tan 2026, arXiv 2601.04710, algorithms 1 and 2), in n + 2 forward passes. v is not
    normalised: E|v|^2 = d (1 / a + 1 / (n - a)) in d dimensions.

    Of a loss that is linear over eps the expectation is E[A^2] grad, A the same contrast of n numbers drawn from a
    normal distribution: 1 + 2 sqrt(3) / pi, or 2.10, for n = 4 in halves. For n = 2 the estimate is that of plain MeZO
    along z_1 - z_2 whichever is better, for twice the passes, so n is 3 or more.
    """

    name: ClassVar[str] = "guided"
    summary: ClassVar[str] = "MeZO-GV (arXiv 2601.04710): n forward passes find a direction, two measure the slope"
    guides: ClassVar[bool] = True

    elite_share: Share = 0.5
    """Share of a step's directions, those of the least losses, whose mean begins the guiding vector; the mean of the
    others is taken from it."""

    def refusals(
        self, *, num_perturbations: int = 1, weight_decay: float = 0.0, normalise_z: bool = False, z_score: bool = False
    ) -> Iterator[tuple[str, str]]:
        """See `Rule.refusals`."""
        if num_perturbations < 3:
            why = "the rule guided contrasts directions; of two it is sgd along their difference, for twice the passes"
            yield "num_perturbations", f"must be >= 3, got {num_perturbations}: {why}"
        elif not self._elite(num_perturbations):
            why = f"such a share of {num_perturbations} directions is none"
            yield "elite_share", f"must be at least {1 / num_perturbations:.4g}, got {self.elite_share}: {why}"

    def half_distance(self, eps: float) -> float:
        """eps / 2: what a log has for each z is the slope against the mean of the losses, not against a second sign."""
        return eps / 2

    def contrast(self, losses: Losses) -> tuple[float, ...]:
        """See `Rule.contrast`. Of equal losses the one that was drawn first counts as less.

        >>> Guided().contrast(Losses((3.0, 1.0, 2.0, 9.0), (0.0,) * 4))
        (-0.5, 0.5, 0.5, -0.5)
        """
        n = len(losses.plus)
        elite = self._elite(n)
        best = set(sorted(range(n), key=losses.plus.__getitem__)[:elite])
        return tuple(1 / elite if k in best else -1 / (n - elite) for k in range(n))

    def slopes(self, projected_grads: Sequence[float], tried: Sequence[float], eps: float) -> Sequence[float]:
        """See `Rule.slopes`."""
        return (projected_grad(*tried, eps),) if tried else (math.nan,)

    def _elite(self, n: int) -> int:
        return int(self.elite_share * n)

    def plan(
        self,
        seeds: Sequence[int],
        projected_grads: Sequence[float],
        losses: Losses,
        lr: float,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        norms: Sequence[float] = (),
        products: Sequence[Sequence[float]] = (),
    ) -> Update:
        """See `Rule.plan`; projected_grads has one item, g along v: it is what is clipped."""
        if not all(map(math.isfinite, losses.plus)):
            return Update.skip(seeds)
        (slope,) = projected_grads
        slope = max(-clip, min(clip, slope)) if clip else slope
        weights = [len(seeds) * slope * weight for weight in self.contrast(losses)]
        return super().plan(seeds, weights, losses, lr, weight_decay, norms=norms)
