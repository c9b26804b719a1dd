"""Adam within a random subspace: moments of a few slopes, not of theta, along directions that stay for some steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo.method.estimator import Losses
from mezo.method.rules.base import Rule
from mezo.method.step import Update
from mezo.ranges import AtLeastOne, Positive, Share


@dataclass(frozen=True)
class SubspaceAdam(Rule):
    """theta <- theta decay - lr sum_k a_k z_k, a_k Adam's step of the slope g_k; z_k stay for `refresh_every` steps.

    m_k <- beta1 m_k + (1 - beta1) g_k; v_k <- beta2 v_k + (1 - beta2) g_k^2; a_k = m_k / (1 - beta1^s) / (sqrt(v_k / (1
    - beta2^t)) + adam_eps): Adam on x where theta = theta_0 - sum_k x_k z_k. t counts the steps of the run, s those of
    the subspace: with new directions the m_k begin anew and the v_k go on, which are alike for any direction.

    It takes from SubZero+ (Yu et al. 2026, arXiv 2608.15665, section 4.2) Adam within a random subspace that is drawn
    anew every F steps. There a subspace is U R V^T of each matrix and K random R are measured in it, on one side; here
    it is the span of the step's directions, each of which is measured in every step.

    Its state is scalars, made by single multiplications, divisions and roots of float64: every machine has the same
    bits. The log has the coefficients lr a_k, so a replay needs none of it.
    """

    name: ClassVar[str] = "subspace-adam"
    summary: ClassVar[str] = "Adam on the slopes along directions that stay for some steps; no state a parameter"
    remembers: ClassVar[bool] = True
    logged_as: ClassVar[dict[str, str]] = {
        "beta1": "beta1",
        "beta2": "beta2",
        "adam_eps": "eps",
        "refresh_every": "refresh_every",
    }

    beta1: Share = 0.9
    """How much of the first moment is left at each step."""
    beta2: Share = 0.999
    """How much of the second moment is left at each step."""
    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""
    refresh_every: AtLeastOne = 50
    """Steps that share their directions z, before others are drawn."""

    @property
    def period(self) -> int:
        """See `Rule.period`."""
        return self.refresh_every

    def refusals(
        self, *, num_perturbations: int = 1, weight_decay: float = 0.0, normalise_z: bool = False, z_score: bool = False
    ) -> Iterator[tuple[str, str]]:
        """See `Rule.refusals`."""
        if z_score:
            why = "rewards of one scale each step leave Adam nothing to tell a steep direction by"
            yield "z_score_rewards", f"must be off: {why}"

    def remember(
        self, moments: Sequence[float], number: int, projected_grads: Sequence[float], clip: float = 0.0
    ) -> tuple[list[float], list[float]]:
        """See `Rule.remember`. Moments are the number of the subspace, beta1^s, beta2^t, and all m and v.

        >>> rule = SubspaceAdam(beta1=0.5, beta2=0.75, adam_eps=2.0**-100)
        >>> rule.remember([], 0, [3.0, -0.1])
        ([0.0, 0.5, 0.75, 1.5, -0.05, 2.25, 0.0025000000000000005], [1.0, -1.0])
        """
        n, subspace = len(projected_grads), float(number // self.refresh_every)
        fresh = [subspace, 1.0, 1.0, *(0.0,) * (2 * n)]
        before, power1, power2, *kept = moments if len(moments) == len(fresh) else fresh
        first, second = kept[:n], kept[n:]
        if before != subspace:
            power1, first = 1.0, [0.0] * n
        power1, power2 = power1 * self.beta1, power2 * self.beta2
        grads = [max(-clip, min(clip, g)) for g in projected_grads] if clip else projected_grads
        first = [self.beta1 * m + (1 - self.beta1) * g for m, g in zip(first, grads, strict=True)]
        second = [self.beta2 * v + (1 - self.beta2) * (g * g) for v, g in zip(second, grads, strict=True)]
        steps = [
            m / (1 - power1) / (math.sqrt(v / (1 - power2)) + self.adam_eps) for m, v in zip(first, second, strict=True)
        ]
        return [subspace, power1, power2, *first, *second], steps

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
        """See `Rule.plan`; projected_grads are the a_k of `remember`, which clips: coefficients are lr a_k."""
        n = len(seeds)
        return super().plan(seeds, [n * a for a in projected_grads], losses, lr, weight_decay, norms=norms)
