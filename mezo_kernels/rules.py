"""Update rules that `rule_step_` fuses into one pass over all parameters: momentum, Adam, AdamW and sign.

A step has one estimate of the gradient, g = sum_k w_k z(seed_k) with w_k = projected_grad_k / n, formed in float32 in
order from zero; then its rule is applied once. Momentum is linear in g, Adam and sign are not: to apply them once for
each perturbation would be another method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {"momentum": 0, "adam": 1, "adamw": 1, "sign": 2}
"""Code of each rule in the compiled kernels; Adam and AdamW differ by `l2` alone."""
STATES = {"momentum": 1, "adam": 2, "adamw": 2, "sign": 0}
"""float32 tensors of state that a rule keeps for each parameter: 4 bytes an element each."""


@dataclass(frozen=True)
class Rule:
    """How an estimate g of the gradient moves theta; all in float32, every operation rounded on its own.

    momentum: m <- beta1 m + g; theta <- theta decay - lr m (the heavy ball, as torch.optim.SGD has it).
    adam, adamw: g <- g + l2 theta; m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g**2;
    theta <- theta decay - lr / (1 - beta1**t) * (m / (sqrt(v) / sqrt(1 - beta2**t) + eps)), t counting from 1 (Kingma
    and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101).
    sign: theta <- theta decay - lr sign(g), sign(0) = 0 (signSGD, arXiv 1802.04434; ZO-signSGD, Liu et al. 2019).

    Args:
        kind: "momentum", "adam", "adamw" or "sign".
        beta1: of momentum and of Adam's first moment, in [0, 1).
        beta2: of Adam's second moment, in [0, 1).
        eps: Adam's, > 0.
        l2: Adam's weight decay, added to the gradient; >= 0. AdamW has the decay of a step instead.
    Raises:
        ValueError: an unknown kind, a number outside its range.

    >>> Rule("adam").states, Rule("momentum").states
    (2, 1)
    """

    kind: str
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind of rule must be one of {', '.join(KINDS)}; got {self.kind!r}")
        for name, inside, text in (
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("eps", 2.0**-126 <= self.eps < math.inf, "a finite float32 number > 0"),
            ("l2", 0 <= self.l2 < math.inf, "a finite number >= 0"),
        ):
            if not inside:
                raise ValueError(f"{name} of rule must be {text}, got {getattr(self, name)}")
        if self.l2 and self.kind != "adam":
            raise ValueError(f"l2 is of the rule adam; {self.kind} has the decay of a step")

    @property
    def states(self) -> int:
        """float32 numbers that it keeps for each element."""
        return STATES[self.kind]

    @property
    def constants(self) -> list[float]:
        """beta1, 1 - beta1, beta2, 1 - beta2, eps, l2: rounded to float32 once, by the backends' caller."""
        return [self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.eps, self.l2]

    def rate(self, lr: float, t: int) -> tuple[float, float]:
        """(what multiplies the step, what multiplies sqrt(v)) of update t, from 1: Adam's bias corrections, float64.

        >>> Rule("adam", beta1=0.5, beta2=0.75).rate(0.5, 1)
        (1.0, 2.0)
        """
        if KINDS[self.kind] != KINDS["adam"]:
            return lr, 1.0
        return lr / (1 - self.beta1**t), 1 / math.sqrt(1 - self.beta2**t)


@dataclass(frozen=True)
class RuleUpdate:
    """One step of a rule.

    Args:
        seeds: of the step's perturbations, at least one.
        weights: projected_grad_k / n of each, finite float32.
        lr: learning rate, finite.
        t: number of the update, from 1; skipped steps do not count.
        decay: theta is multiplied by it first, 1 - lr * weight_decay; 1 is skipped.
    """

    seeds: Sequence[int]
    weights: Sequence[float]
    lr: float
    t: int
    decay: float = 1.0
