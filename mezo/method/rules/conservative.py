"""The best of theta and a plain step either way, by the losses of the same batch."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo.method.rules.base import Rule
from mezo.method.step import Update


@dataclass(frozen=True)
class Conservative(Rule):
    """theta, theta - c z or theta + c z with c = lr projected_grad, whichever has the least loss; theta among equals.

    ZO-SGD-Cons of Zhang et al. (2024, arXiv 2402.11592).
    """

    name: ClassVar[str] = "conservative"
    summary: ClassVar[str] = "the best of theta and a plain step either way; four more forward passes a step"
    compares: ClassVar[bool] = True

    def refusals(
        self, *, num_perturbations: int = 1, weight_decay: float = 0.0, normalise_z: bool = False, z_score: bool = False
    ) -> Iterator[tuple[str, str]]:
        """See `Rule.refusals`."""
        if num_perturbations != 1:
            yield "num_perturbations", f"must be 1, got {num_perturbations}: the rule conservative tries one direction"
        if weight_decay:
            why = "the rule conservative keeps one of three thetas that it compared, none of them decayed"
            yield "weight_decay", f"must be 0, got {weight_decay}: {why}"
        if z_score:
            why = "standardised rewards of two scorings do not compare, as the rule conservative needs"
            yield "z_score_rewards", f"must be off: {why}"

    def choose(self, update: Update, tried: Sequence[float]) -> Update:
        """See `Rule.choose`. A loss that is not finite is not taken.

        >>> planned = Update((7,), (0.5,))
        >>> [Conservative().choose(planned, tried).coefficients for tried in ((1.0, 0.9, 1.2), (1.0, 1.0, 0.8), ())]
        [(0.5,), (-0.5,), (0.0,)]
        """
        losses = [loss if math.isfinite(loss) else math.inf for loss in tried] or [0.0]
        (c,) = update.coefficients
        return dataclasses.replace(update, coefficients=((0.0, c, -c)[losses.index(min(losses))],))
