"""Rules that act once a step on the whole estimate, fused into one pass: momentum, Adam, AdamW, sign.

Adam and sign are not linear in the estimate g = 1/n sum_k projected_grad_k z_k: to apply them once for each
perturbation would be another method. `mezo_kernels.Rule` has the formulas.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mezo.method.estimator import Losses
from mezo.method.rules.base import Rule
from mezo.ranges import Positive, Share

if TYPE_CHECKING:
    from mezo_kernels import Rule as Kernel


@dataclass(frozen=True)
class _OnTheEstimate(Rule):
    """A rule that applies lr itself: its coefficients are projected_grad_k / n."""

    def scale(self, lr: float, losses: Losses) -> float:
        """1: the rule multiplies by lr."""
        return 1.0


@dataclass(frozen=True)
class Momentum(_OnTheEstimate):
    """m <- momentum m + g; theta <- theta decay - lr m: the heavy ball, as torch.optim.SGD has it."""

    name: ClassVar[str] = "momentum"
    summary: ClassVar[str] = "descent along a running sum of estimates; 4 bytes of state a parameter"
    logged_as: ClassVar[dict[str, str]] = {"momentum": "beta1"}

    momentum: Share = 0.9
    """What is left of the running sum at each step."""

    def kernel(self, l2: float = 0.0) -> "Kernel":
        """See `Rule.kernel`."""
        return _kernel("momentum", beta1=self.momentum)


@dataclass(frozen=True)
class AdamW(_OnTheEstimate):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    name: ClassVar[str] = "adamw"
    summary: ClassVar[str] = "Adam with decoupled weight decay; 8 bytes of state a parameter"
    logged_as: ClassVar[dict[str, str]] = {"beta1": "beta1", "beta2": "beta2", "adam_eps": "eps"}

    beta1: Share = 0.9
    """How much of the first moment, the running mean of estimates, is left at each step."""
    beta2: Share = 0.999
    """How much of the second moment, the running mean of their squares, is left at each step."""
    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""

    def kernel(self, l2: float = 0.0) -> "Kernel":
        """See `Rule.kernel`."""
        return _kernel(self.name, beta1=self.beta1, beta2=self.beta2, eps=self.adam_eps, l2=l2)


@dataclass(frozen=True)
class Adam(AdamW):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980); weight decay is added to the gradient."""

    name: ClassVar[str] = "adam"
    summary: ClassVar[str] = "Adam; weight decay is added to the gradient; 8 bytes of state a parameter"

    def decay(self, lr: float, weight_decay: float) -> float:
        """1: the decay is part of the gradient."""
        return 1.0

    def l2(self, weight_decay: float) -> float:
        """See `Rule.l2`."""
        return weight_decay


@dataclass(frozen=True)
class Sign(_OnTheEstimate):
    """theta <- theta decay - lr sign(g), sign(0) = 0 (ZO-signSGD, Liu et al. 2019)."""

    name: ClassVar[str] = "sign"
    summary: ClassVar[str] = "a step of lr along the sign of each element of the estimate"

    def kernel(self, l2: float = 0.0) -> "Kernel":
        """See `Rule.kernel`."""
        return _kernel("sign")


def _kernel(kind: str, **constants: float) -> "Kernel":
    from mezo_kernels import Rule as Kernel  # torch: `mezo train --help` does without

    return Kernel(kind, **constants)
