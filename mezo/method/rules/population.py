"""Plain steps along other estimates of a population of perturbations: one-sided, standardised losses, ranks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo.method.estimator import Losses
from mezo.method.rules.base import Rule
from mezo.method.rules.fzoo import deviation
from mezo.method.step import Update


@dataclass(frozen=True)
class OneSided(Rule):
    """theta <- theta decay - lr/n sum_k (l_k - l_0) z_k / eps: n estimates from n + 1 forward passes, not 2n.

    l_k is the loss at theta + eps z_k, l_0 that at theta. On a quadratic it is unbiased too; curvature adds to its
    variance, by eps^2 (Berahas et al. 2022, arXiv 1905.01332, section 2).
    """

    name: ClassVar[str] = "one-sided"
    summary: ClassVar[str] = "plain descent, from n + 1 forward passes for n perturbations"
    one_sided: ClassVar[bool] = True


@dataclass(frozen=True)
class ZScore(Rule):
    """theta <- theta decay - lr/n sum_k g_k z_k / s, s the standard deviation of the 2n losses of the step.

    A step is as long whatever the scale of the loss is, as where rewards of a population are standardised (Qiu et al.
    2025, arXiv 2509.24372). With --directions s holds what examples differ in, too. Where s is 0 nothing is changed.
    """

    name: ClassVar[str] = "z-score"
    summary: ClassVar[str] = "plain descent, the losses of a step over their standard deviation"

    def scale(self, lr: float, losses: Losses) -> float | None:
        """lr / s."""
        s = deviation((*losses.plus, *losses.minus))
        return lr / s if s else None


@dataclass(frozen=True)
class Ranks(Rule):
    """theta <- theta decay - lr/n sum_k w_k z_k, w_k = (rank l_k+ - rank l_k-) / (2n - 1) among the 2n losses.

    Rank shaping (Salimans et al. 2017, arXiv 1703.03864, section 2): a loss far from the others counts no more than the
    next one, and any increasing function of the loss gives the same run. w_k is in [-1, 1]; losses that are equal share
    their mean rank. With --directions examples differ in their losses, too.
    """

    name: ClassVar[str] = "ranks"
    summary: ClassVar[str] = "plain descent, the losses of a step replaced by their ranks"

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
        """See `Rule.plan`; `weights` stand for projected_grads."""
        return super().plan(seeds, weights(losses), losses, lr, weight_decay, clip, norms)


def weights(losses: Losses) -> tuple[float, ...]:
    """(rank of loss_plus - rank of loss_minus) / (2n - 1) of each perturbation.

    >>> weights(Losses((1.0, 9.0), (2.0, 2.0)))
    (-0.5, 0.5)
    """
    values = [*losses.plus, *losses.minus]
    order, rank = sorted(range(len(values)), key=values.__getitem__), [0.0] * len(values)
    place = 0
    for _, equal in itertools.groupby(order, key=values.__getitem__):
        members = list(equal)
        for i in members:
            rank[i] = place + (len(members) - 1) / 2
        place += len(members)
    n = len(losses.plus)
    return tuple((rank[k] - rank[n + k]) / (2 * n - 1) for k in range(n))
