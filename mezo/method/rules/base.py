"""What every update rule is: the z it draws, the losses it compares, its state, and the update it plans of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mezo.method.estimator import Losses
from mezo.method.step import Update
from mezo.ranges import LARGEST

if TYPE_CHECKING:  # torch: `mezo train --help` does without
    from mezo_kernels import Rule as Kernel


RULES: dict[str, type["Rule"]] = {}
"""Every rule by the name that `--update-rule` and `MeZO(rule=...)` take."""


@dataclass(frozen=True)
class Rule:
    """How the losses of a step move theta. A rule is a subclass with a `name`: defining it makes it known to `RULES`.

    The fields of a subclass are its options: on the command line (`--momentum 0.9`) and of `mezo.MeZO`.

    Class attributes:
        name: what `--update-rule` and `MeZO(rule=...)` take.
        summary: one line for `--help`.
        distribution: of z, "normal" or "rademacher".
        one_sided: an estimate compares theta + eps z with theta itself, so n of them cost n + 1 forward passes.
        compares: a step also scores theta and theta a step to either side, and `choose` keeps the best of the three.
        projects: `plan` needs the inner products of the z.
        guides: a step scores theta + eps z alone, and then both signs along the `contrast` of these directions.
        remembers: `plan` takes what `remember` makes of the slopes of this step and those before.
        logged_as: option -> key of the log's header, for options that a replay needs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    distribution: ClassVar[str] = "normal"
    one_sided: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    guides: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    logged_as: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls):
        if "name" in vars(cls):
            RULES[cls.name] = cls

    def refusals(
        self, *, num_perturbations: int = 1, weight_decay: float = 0.0, normalise_z: bool = False, z_score: bool = False
    ) -> Iterator[tuple[str, str]]:
        """(option, why it must be otherwise) of options that this rule cannot go with.

        Args:
            num_perturbations: directions a step averages.
            weight_decay: of the run.
            normalise_z: each z is divided by its root mean square.
            z_score: rewards are standardised over a step.
        """
        yield from ()

    def kernel(self, l2: float = 0.0) -> "Kernel | None":
        """The fused op's rule, where this one keeps state or acts on the whole estimate; None where `step_` does all.

        Args:
            l2: weight decay as part of the gradient, of Adam alone.
        """
        return None

    def l2(self, weight_decay: float) -> float:
        """Weight decay that is part of the gradient, where the rule has it there: Adam's; else 0."""
        return 0.0

    @property
    def state_bytes(self) -> int:
        """Bytes of state for each trained parameter: 4 for a float32 moment."""
        kernel = self.kernel()
        return 4 * kernel.states if kernel else 0

    def passes(self, num_perturbations: int) -> int:
        """Forward passes of a batch that a step takes, of so many perturbations for every example."""
        if self.guides:
            return num_perturbations + 2
        return (num_perturbations + 1 if self.one_sided else 2 * num_perturbations) + 3 * self.compares

    def half_distance(self, eps: float) -> float:
        """Half the way, in units of z, between the two thetas of a projected_grad."""
        return eps / 2 if self.one_sided else eps

    def scale(self, lr: float, losses: Losses) -> float | None:
        """What multiplies the mean estimate: lr for plain descent. None: theta stays as it is.

        Args:
            lr: learning rate of the step.
            losses: of the step.
        """
        return lr

    def decay(self, lr: float, weight_decay: float) -> float:
        """What theta is multiplied by first: 1 - lr * weight_decay (decoupled weight decay)."""
        return 1 - lr * weight_decay

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
        """The update of a step: coefficients[k] = scale * projected_grad_k / n, over the norm of z_k if there are any.

        A step with a loss or coefficient that is no finite float32 is skipped: it must change nothing.

        Args:
            seeds: of z, one a perturbation.
            projected_grads: the estimate along each; of a rule that `guides` one item, the estimate along its contrast;
                of one that `remembers` what it makes of them.
            losses: of the step.
            lr: learning rate of the step.
            weight_decay: of the run.
            clip: each projected_grad is first brought into [-clip, clip]; 0 leaves it as it is.
            norms: root mean square of each z, which perturbations were divided by; () leaves z as it is.
            products: z_k . z_l of a rule that `projects`; else ().
        """
        scale, n = self.scale(lr, losses), len(seeds)
        clipped = [max(-clip, min(clip, g)) for g in projected_grads] if clip else projected_grads
        coefficients = tuple(0.0 if scale is None else scale * g / n for g in clipped)
        coefficients = tuple(c / norm for c, norm in zip(coefficients, norms, strict=True)) if norms else coefficients
        if not _usable((*losses.plus, *losses.minus, *coefficients)):
            return Update.skip(seeds)
        decay = 1.0 if scale is None else self.decay(lr, weight_decay)
        return Update(tuple(seeds), coefficients, decay, lr if self.kernel() else None)

    @property
    def period(self) -> int:
        """Steps in a row that have the same z."""
        return 1

    def remember(
        self, moments: Sequence[float], number: int, projected_grads: Sequence[float], clip: float = 0.0
    ) -> tuple[list[float], Sequence[float]]:
        """(moments after a step, what `plan` takes of it), from the log alone: the same bits wherever they are made.

        A step that is skipped leaves the moments of the step before.

        Args:
            moments: float64 numbers after the step before; empty at first.
            number: of the step, from 0.
            projected_grads: finite or not, along each z.
            clip: each is first brought into [-clip, clip]; 0 leaves it as it is.
        """
        return [], projected_grads

    def slopes(self, projected_grads: Sequence[float], tried: Sequence[float], eps: float) -> Sequence[float]:
        """The estimates that `plan` takes: those along each z, or the one along the contrast of a rule that `guides`.

        Args:
            projected_grads: along each z.
            tried: of a rule that guides, losses at theta + eps v and theta - eps v; () where one before is not finite.
            eps: perturbation scale.
        """
        return projected_grads

    def contrast(self, losses: Losses) -> tuple[float, ...]:
        """Of a rule that `guides`: the weight of each z in the direction along which a step's slope is measured.

        Args:
            losses: of the step, finite.
        """
        raise NotImplementedError(f"{self.name} guides no step")

    def choose(self, update: Update, tried: Sequence[float]) -> Update:
        """Of a rule that `compares`: the update to make, by the losses of the three thetas it decides between.

        Args:
            update: as planned, of one perturbation, c its coefficient.
            tried: losses at theta, theta - c z and theta + c z; () where c is below any float32.
        """
        raise NotImplementedError(f"{self.name} compares no thetas")


def _usable(numbers: Sequence[float]) -> bool:
    """Whether every loss and coefficient is a finite float32."""
    return all(math.isfinite(number) and abs(number) < LARGEST for number in numbers)
