"""SPSA: two losses under one z give the derivative along z (Spall 1992; MeZO, arXiv 2305.17333, algorithm 1)."""

import math
import statistics
from collections.abc import Sequence

from mezo.config import Config
from mezo.config.checks import STATEFUL
from mezo.method.schedule import learning_rate

LARGEST = 3.4028234663852886e38  # float32


def projected_grad(loss_plus: float, loss_minus: float, eps: float) -> float:
    """(loss_plus - loss_minus) / (2 eps): the estimate of z . grad loss, with an O(eps**2) bias.

    The one-sided difference of losses at theta + h z and theta is that of eps = h / 2, about theta + h / 2 z: its error
    is O(h) in each estimate, eps z . Hz, though even in z, so that its product with z has mean zero.

    >>> projected_grad(1.5, 1.0, 0.25)
    1.0
    """
    return (loss_plus - loss_minus) / (2 * eps)


def coefficients(projected_grads: tuple[float, ...], lr: float, clip: float = 0.0) -> tuple[float, ...]:
    """c_k = (lr * projected_grad_k) / n of the update theta <- theta - sum_k c_k z_k, formed in float64.

    Args:
        projected_grads: one a perturbation.
        lr: learning rate of the step.
        clip: each projected_grad is first brought into [-clip, clip]; 0 leaves it as it is.

    >>> coefficients((2.0, -4.0), lr=0.5)
    (0.5, -1.0)
    >>> coefficients((2.0, -4.0), lr=0.5, clip=2.0)
    (0.5, -0.5)
    """
    clipped = tuple(max(-clip, min(clip, g)) for g in projected_grads) if clip else projected_grads
    return tuple(lr * g / len(clipped) for g in clipped)


def deviation(losses: Sequence[float]) -> float:
    """Sample standard deviation, from exact sums: 0 of equal losses and of no others; NaN where one is not finite.

    >>> deviation([0.1, 0.1, 0.1]), deviation([1.0, 3.0]) ** 2
    (0.0, 2.0000000000000004)
    """
    return statistics.stdev(losses) if all(map(math.isfinite, losses)) else math.nan


def planned(
    config: Config,
    step: int,
    projected_grads: tuple[float, ...],
    loss_plus: Sequence[float] = (),
    norms: Sequence[float] = (),
) -> tuple[tuple[float, ...], float, float]:
    """(coefficients, decay, lr) of a step's update as the configuration has them.

    A rule that acts on the whole estimate applies lr itself: its coefficients are projected_grad_k / n. Adam's weight
    decay is part of the rule. fzoo divides by the standard deviation of the losses (Dang et al. 2025, arXiv 2506.09034:
    theta - lr g / sigma with g = sum_k (l_k - l_0) u_k / (n eps), sigma^2 = sum_k (l_k - mean l)^2 / (n - 1), as the
    authors' page of the paper has them, dkmiyan.github.io/FZOO_hp); where that is 0 nothing is changed. (Their code,
    DKmiyan/FZOO, leaves eps out and takes the population's sigma: its lr is lr sqrt((n - 1) / n) / eps.)

    Args:
        config, step: of the run.
        projected_grads: one a perturbation.
        loss_plus: losses at theta + eps z of each; read by fzoo.
        norms: root mean square of each z, which perturbations and coefficients are divided by; () leaves z as it is.
    """
    lr = learning_rate(step, config.steps, config.lr, config.lr_schedule, config.warmup_steps)
    scale = 1.0 if config.update_rule in STATEFUL else lr
    decay = 1.0 if config.update_rule == "adam" else 1 - lr * config.weight_decay
    if config.update_rule == "fzoo":
        sigma = deviation(loss_plus)
        if sigma == 0:
            return (0.0,) * len(projected_grads), 1.0, lr
        scale = lr / sigma
    steps = coefficients(projected_grads, scale, config.clip)
    return tuple(c / norm for c, norm in zip(steps, norms, strict=True)) if norms else steps, decay, lr


def best_of_three(coefficient: float, tried: tuple[float, ...]) -> tuple[tuple[float], int]:
    """The coefficient whose loss is least among 0, c and -c, and its place; theta stays as it is among equals.

    ZO-SGD-Cons of Zhang et al. (2024, arXiv 2402.11592).

    Args:
        coefficient: c, lr * projected_grad.
        tried: losses at theta, theta - c z and theta + c z; () where c is too small to be tried. One that is not
            finite is not taken.

    >>> best_of_three(0.5, (1.0, 0.9, 1.2)), best_of_three(0.5, (1.0, 1.0, 0.8)), best_of_three(0.5, ())
    (((0.5,), 1), ((-0.5,), 2), ((0.0,), 0))
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in tried] or [0.0]
    best = losses.index(min(losses))
    return ((0.0, coefficient, -coefficient)[best],), best


def usable(numbers: tuple[float, ...]) -> bool:
    """True if every loss or coefficient is a finite float32; a step with one that is not must change nothing."""
    return all(math.isfinite(number) and abs(number) < LARGEST for number in numbers)
