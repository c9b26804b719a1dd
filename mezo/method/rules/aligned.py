"""Projection alignment: the gradient's projection on the span of a step's directions, in place of their average."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo.method.estimator import Losses
from mezo.method.rules.base import Rule
from mezo.method.step import Update

LEAST = 1e-9  # share of |z|^2 that must be new in each direction: less is what rounding leaves of none


@dataclass(frozen=True)
class Aligned(Rule):
    """theta <- theta decay - lr/n sum_k w_k z_k, w = t (Z Z^T)^-1 c with c the projected_grads, t the mean |z_k|^2.

    sum_k w_k z_k / t is the shortest vector whose slope along each z_k is c_k: the gradient's projection on what the z
    span (projection alignment, arXiv 2509.15552). Of n directions in d dimensions its cosine with the gradient has the
    mean square n / d, that of the plain average about n / (n + d + 1): it gains where n is a good part of d. Where
    the z are orthogonal and of one length it is the plain average.
    """

    name: ClassVar[str] = "aligned"
    summary: ClassVar[str] = (
        "plain descent along the gradient's projection on the step's directions; for few parameters"
    )
    projects: ClassVar[bool] = True

    def refusals(
        self, *, num_perturbations: int = 1, weight_decay: float = 0.0, normalise_z: bool = False, z_score: bool = False
    ) -> Iterator[tuple[str, str]]:
        """See `Rule.refusals`."""
        if normalise_z:
            yield "normalise_z", "must be off: the rule aligned takes the lengths of the z into account already"

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
        """See `Rule.plan`; w stands for the projected_grads, which are clipped before. No products: orthogonal z."""
        if not len(products):
            return super().plan(seeds, projected_grads, losses, lr, weight_decay, clip)
        if clip:
            projected_grads = [max(-clip, min(clip, g)) for g in projected_grads]
        scale = sum(row[k] for k, row in enumerate(products)) / len(seeds)
        weights = [scale * w for w in solved(products, projected_grads)]
        return super().plan(seeds, weights, losses, lr, weight_decay)


def solved(products: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """x with A x = values, A symmetric and positive definite; NaN where rounding decides whether it is.

    Gauss without pivots, which such a matrix does not need, and by single multiplications and subtractions of float64
    alone, in one order: every machine has the same bits, where a library's solver need not.

    Args:
        products: A, (n, n).
        values: n.

    >>> solved([[4.0, 2.0], [2.0, 3.0]], [8.0, 8.0])
    [1.0, 2.0]
    """
    import torch  # `mezo train --help` does without

    n = len(values)
    a = torch.as_tensor(products, dtype=torch.float64).clone()
    x = torch.tensor(values, dtype=torch.float64)
    for k in range(n):
        if not a[k, k] > LEAST * products[k][k]:
            return [float("nan")] * n
        factors = a[k + 1 :, k] / a[k, k]
        x[k + 1 :] -= factors * x[k]
        a[k + 1 :, k + 1 :] -= factors[:, None] * a[k, k + 1 :]
    for k in reversed(range(n)):
        x[k] /= a[k, k]
        x[:k] -= a[:k, k] * x[k]
    return x.tolist()
