"""What travels through a step: the perturbations it measures, and the update that is made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """The perturbations of a step: theta + eps_k z(seed_k) and theta - eps_k z(seed_k).

    It is made once; perturbed copies of theta are written from it, scored for it, and logged under its seeds.

    Args:
        seeds: of z, one a perturbation, each in [0, 2**64).
        eps: perturbation scale, > 0; one number for all perturbations, or one for each.
        number: of the step, from 0.
        weights: one for each seed. With weights w there is one perturbation, along sum_k w_k z(seed_k): theta +
            sum_k eps_k w_k z(seed_k) and theta - the same.

    >>> step = Step([7, 8], 0.1)
    >>> step.eps, step.part([1])
    ((0.1, 0.1), Step(seeds=(8,), eps=(0.1,), number=0, weights=()))
    >>> len(step), len(Step([7, 8], 0.1, weights=(1.0, -1.0)))
    (2, 1)
    """

    seeds: Sequence[int]
    eps: float | Sequence[float]
    number: int = 0
    weights: Sequence[float] = ()

    def __post_init__(self):
        seeds = tuple(self.seeds)
        eps = tuple(self.eps) if isinstance(self.eps, Sequence) else (self.eps,) * len(seeds)
        if len(eps) != len(seeds):
            raise ValueError(f"eps must be one number, or one a seed: got {len(eps)} for {len(seeds)} seeds")
        weights = tuple(self.weights)
        if weights and len(weights) != len(seeds):
            raise ValueError(f"weights must be one a seed, or none: got {len(weights)} for {len(seeds)} seeds")
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def of_run(
        cls,
        run_seed: int,
        number: int,
        count: int,
        eps: float,
        norm: Callable[[int], float] | None = None,
        period: int = 1,
    ) -> "Step":
        """Step `number` of a run: a pure function of its arguments, so that a run can stop and resume anywhere.

        Args:
            run_seed: seed of the run, in [0, 2**64).
            number: of the step, from 0.
            count: perturbations, >= 1.
            eps: perturbation scale, > 0.
            norm: root mean square of z(seed), where every z is divided by its own (--normalise-z); else None.
            period: steps in a row that have the seeds of the first of them, `Rule.period`.
        """
        from mezo_kernels import perturbation_seed  # torch: `mezo train --help` does without

        seeds = tuple(perturbation_seed(run_seed, number - number % period, k) for k in range(count))
        return cls(seeds, [eps / norm(seed) for seed in seeds] if norm else eps, number)

    def part(self, places: Sequence[int]) -> "Step":
        """Some of its perturbations, as many as a runtime holds at once."""
        return Step([self.seeds[k] for k in places], [self.eps[k] for k in places], self.number)

    def along(self) -> list[tuple[int, float]]:
        """(seed, eps weight) of each z of a perturbation along several, as `weights` say."""
        return [(seed, eps * w) for seed, eps, w in zip(self.seeds, self.eps, self.weights, strict=True)]

    def __len__(self) -> int:
        return 1 if self.weights else len(self.seeds)


@dataclass(frozen=True)
class Update:
    """theta <- theta * decay - sum_k coefficients[k] z(seeds[k]), or what a rule with state makes of that sum.

    Args:
        seeds: of z, one a perturbation.
        coefficients: finite float32. With `lr` the sum is the estimate of the gradient, unscaled.
        decay: 1 - lr * weight_decay.
        lr: learning rate, where a rule with state applies it; else None, and the coefficients hold it.
        skipped: nothing is changed, a rule's state neither.
    """

    seeds: Sequence[int]
    coefficients: Sequence[float]
    decay: float = 1.0
    lr: float | None = None
    skipped: bool = False

    @classmethod
    def skip(cls, seeds: Sequence[int]) -> "Update":
        """The update of a step that changes nothing."""
        return cls(tuple(seeds), (0.0,) * len(seeds), skipped=True)

    def directions(self) -> list[tuple[int, float, float]]:
        """(seed, coefficient, decay) in order, as `mezo_kernels.step_` takes them: the first one decays theta.

        >>> Update([7, 8], [0.5, 0.25], decay=0.9).directions()
        [(7, 0.5, 0.9), (8, 0.25, 1.0)]
        """
        decays = (self.decay, *(1.0 for _ in self.seeds[1:]))
        return list(zip(self.seeds, self.coefficients, decays, strict=True))
