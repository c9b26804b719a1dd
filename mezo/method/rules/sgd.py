"""Plain descent along the estimate: MeZO itself."""

from dataclasses import dataclass
from typing import ClassVar

from mezo.method.rules.base import Rule


@dataclass(frozen=True)
class SGD(Rule):
    """theta <- theta decay - lr/n sum_k projected_grad_k z_k (Malladi et al. 2023, arXiv 2305.17333, algorithm 1)."""

    name: ClassVar[str] = "sgd"
    summary: ClassVar[str] = "plain descent along the estimate, as in the MeZO paper"
