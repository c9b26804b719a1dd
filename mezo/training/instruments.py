"""What projected_grad is worth, measured between steps: its noise and spread, rounding, and autograd's gradient.

Nothing here changes a run: the same log comes of it with and without.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from mezo.config import Config
from mezo.run.trajectory import StepRecord
from mezo.runtimes.base import Differentiable, Runtime, require
from mezo.training.clock import Clock
from mezo.training.measurement import Measurement, Scores
from mezo_kernels import ParamLayout, rademacher, standard_normal, step_

DRAW = {"normal": standard_normal, "rademacher": rademacher}

LOOKED_AT = 1 << 16  # elements of a parameter that its rounding is judged by


class Instruments:
    """Rows of metrics.jsonl about the estimate itself.

    Args:
        config: the run's.
        runtime: at theta of the step that is looked at, the next step's perturbations written.
        measurement: of a step's losses; it keeps the scores of the last steps.
        clock: what is done here is evaluation.
    """

    def __init__(self, config: Config, runtime: Runtime, measurement: Measurement, clock: Clock):
        self.config, self.runtime, self.measurement, self.clock = config, runtime, measurement, clock

    def rows(self, records: Sequence[StepRecord], metrics: Sequence[dict]) -> Iterator[dict]:
        """What is due after these records and not among the rows there are; only finite numbers.

        `noise`: of projected_grad, from scoring the same theta again, beside its root mean square since the last one.
        `spread`: standard deviation over a step's perturbations and standard error of the mean over its batch, of
        projected_grad; and what the base's dtype leaves of a perturbation (`realised_perturbation`).
        `gradient`: `against_gradient`, where --true-gradient asks for it.
        """
        step = len(records)
        known = {row["split"] for row in metrics if row["step"] == step}
        wanted = {
            "gradient": self.config.method.true_gradient,
            "spread": self.config.method.noise,
            "noise": self.config.method.noise,
        }
        since = max((row["step"] for row in metrics if row["split"] == "noise"), default=0)
        for kind, measure in (("spread", self._spread), ("noise", self._noise), ("gradient", self._gradient)):
            if wanted[kind] and kind not in known and (step or kind == "gradient"):
                with self.clock.measuring("evaluation"):
                    values = measure(step, records[since:])
                values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
                if values:
                    yield {"step": step, "split": kind, **values}
        self.measurement.recent.clear()

    def _noise(self, step: int, records: Sequence[StepRecord]) -> dict:
        """Score the last batch twice with theta in every copy: what differs is noise, here of projected_grad."""
        eps = self.config.method.half_distance
        self.runtime.equalise()
        batch = self.measurement.batches(step - 1)
        once, again = (self.measurement.held_losses(1, batch) for _ in range(2))
        self._restore(step)
        plus, minus, plus_again, minus_again = (*once.plus, *once.minus, *again.plus, *again.minus)
        differences = (plus - minus, plus_again - minus_again, plus - plus_again, minus - minus_again)
        noise = rms([d / (2 * eps) for d in differences])
        if not math.isfinite(noise):  # theta at which the loss is not finite is reported as a skipped step
            return {}
        return {
            "noise": noise,
            "projected_grad_rms": rms([g for record in used(records) for g in record.projected_grads]),
        }

    def _spread(self, step: int, records: Sequence[StepRecord]) -> dict:
        measurement, config = self.measurement, self.config
        first, rule = measurement.first(measurement.step(step)), config.method.rule
        theta, dtype = self.runtime.theta(), getattr(torch, self.runtime.spec.dtype.split(",")[0])
        return {
            "over_perturbations": spread_over_perturbations(records),
            "over_batch": spread_over_batch(
                measurement.recent,
                measurement.labels,
                measurement.objective,
                config.method.half_distance,
                config.method.batch_size,
            ),
            **realised_perturbation(theta, dtype, first.seeds[0], first.eps[0], rule.distribution, rule.one_sided),
        }

    def _gradient(self, step: int, records: Sequence[StepRecord]) -> dict:
        """The next step's estimate beside autograd's gradient of its batch at the same theta."""
        measurement, batch = self.measurement, self.measurement.batches(step)
        mine, grads = measurement.estimate(measurement.step(step))
        self._restore(step)
        runtime = require(self.runtime, Differentiable, "--true-gradient")
        size, total = self.config.machine.micro_batch_size or len(batch), None
        for i in range(0, len(batch), size):
            part = batch[i : i + size]
            share, labels = len(part) / len(batch), measurement.labels[part]
            found = runtime.gradient("train", part, lambda s, n=share, y=labels: n * measurement.objective(s, y))
            total = found if total is None else {name: total[name] + found[name] for name in found}
        norms = measurement.norms(mine.seeds)
        return against_gradient(mine.seeds, grads, total, self.config.method.rule.distribution, norms)

    def _restore(self, step: int) -> None:
        """Write the next step's perturbations again."""
        self.runtime.perturb(self.measurement.first(self.measurement.step(step)))


def spread_over_perturbations(records: Sequence[StepRecord]) -> float | None:
    """Standard deviation of projected_grad over the perturbations of a step, root mean square over steps.

    Divided by sqrt(n) it is the standard error of their mean. Under normal z it is |grad| to first order (MeZO, arXiv
    2305.17333, section 4): most of it is no fault of the losses.

    >>> from mezo.method.estimator import Losses
    >>> from mezo.method.step import Update
    >>> record = StepRecord(0, Update((1, 2), (0.0, 0.0)), Losses((1.0, 1.0), (1.0, 1.0)), (3.0, 1.0))
    >>> spread_over_perturbations([record]) ** 2
    2.0000000000000004
    """
    groups = [record.projected_grads for record in used(records) if len(record.projected_grads) > 1]
    return rms([torch.tensor(grads, dtype=torch.float64).std().item() for grads in groups]) if groups else None


def spread_over_batch(
    recent: Sequence[Scores], labels: torch.Tensor, objective: Callable, eps: float, batch_size: int
) -> float | None:
    """Standard error of projected_grad as a mean over the examples of a batch, pooled over the last steps.

    Args:
        recent: (indices, scores of both signs by perturbation) of batches or parts of them.
        labels: of the training examples.
        objective: (scores, labels) -> loss, a mean over examples.
        eps: of the perturbations; half of it where one sign is theta itself.
        batch_size: examples that a step's projected_grad is the mean over.
    Returns:
        sqrt(pooled variance of (loss_plus_i - loss_minus_i) / (2 eps) / batch_size); None below two examples.
    """
    squares, freedom = 0.0, 0
    for indices, pairs in recent:
        for pair in pairs:
            losses = [[objective(s[i : i + 1], labels[[n]]).item() for i, n in enumerate(indices)] for s in pair]
            grads = torch.tensor(losses, dtype=torch.float64).diff(dim=0)[0] / (2 * eps)
            if len(indices) > 1 and grads.isfinite().all():
                squares, freedom = squares + (grads - grads.mean()).square().sum().item(), freedom + len(indices) - 1
    return math.sqrt(squares / freedom / batch_size) if freedom else None


def realised_perturbation(
    theta: dict[str, torch.Tensor],
    dtype: torch.dtype,
    seed: int,
    eps: float,
    distribution: str = "normal",
    one_sided: bool = False,
) -> dict:
    """(theta_plus - theta_minus) / 2, one-sided theta_plus - theta, as the model's dtype holds it, against eps z;
    of a long parameter, its beginning.

    Args:
        theta: float32 by canonical name, on the CPU.
        dtype: of the perturbed copies.
        seed: of z.
        eps: perturbation scale.
        distribution: of z.
        one_sided: theta itself is compared with.
    Returns:
        perturbation_error: |realised - eps z| / |eps z|. perturbation_cosine: of the angle between them; 0 if nothing
        was left.

    >>> theta = {"w": torch.full((100,), 1.0)}
    >>> {name: round(value, 2) for name, value in realised_perturbation(theta, torch.bfloat16, 0, 1e-3).items()}
    {'perturbation_error': 0.83, 'perturbation_cosine': 0.57}
    """
    master = ParamLayout({name: tensor.flatten()[:LOOKED_AT] for name, tensor in theta.items()})
    plus, minus = (master.like([torch.empty_like(t, dtype=dtype) for t in master.tensors]) for _ in "+-")
    step_(master, [], 1.0, seed, eps, plus, minus, distribution=distribution)
    if one_sided:
        minus.copy_(master)
    squares = dict.fromkeys(("error", "realised", "nominal", "product"), 0.0)
    for name, above, below in zip(master.names, plus.tensors, minus.tensors, strict=True):
        realised = (above.double() - below.double()).flatten() / (1 if one_sided else 2)
        nominal = eps * DRAW[distribution](seed, name, 0, above.numel()).double()
        pairs = {"realised": (realised,) * 2, "nominal": (nominal,) * 2, "product": (realised, nominal)}
        for kind, (a, b) in (pairs | {"error": (realised - nominal,) * 2}).items():
            squares[kind] += (a @ b).item()
    length = math.sqrt(squares["realised"] * squares["nominal"])
    return {
        "perturbation_error": math.sqrt(squares["error"] / squares["nominal"]),
        "perturbation_cosine": squares["product"] / length if length else 0.0,
    }


def against_gradient(
    seeds: Sequence[int],
    grads: Sequence[float],
    gradient: dict[str, torch.Tensor],
    distribution: str = "normal",
    norms: Sequence[float] = (),
) -> dict:
    """The estimate mean_k projected_grad_k z_k against the gradient itself.

    Args:
        seeds: of z_k.
        grads: projected_grad of each.
        gradient: by canonical name, on the CPU.
        distribution: of z.
        norms: what each z was divided by; () if nothing.
    Returns:
        cosine: of the angle between the two; in d dimensions about sqrt(n / (n + d + 1)), `expected_cosine`, is all
        that n random directions can give (E[g z] = grad, E|g z|^2 = (d + 2) |grad|^2); sqrt(n / (n + d - 1)) for z of
        one length (E|g z|^2 = d |grad|^2).
        projected_grad_error: root mean square of projected_grad_k - z_k . grad over that of z_k . grad: what finite
        eps, rounding and noise add. gradient_norm: |grad|.

    >>> gradient = {"w": torch.tensor([1.0, 2.0])}
    >>> (z,) = torch.stack([standard_normal(7, "w", 0, 2)])
    >>> found = against_gradient([7], [float(z @ gradient["w"])], gradient)
    >>> round(found["gradient_norm"] ** 2), found["expected_cosine"], found["projected_grad_error"] < 1e-6
    (5, 0.5, True)
    """
    n, size = len(seeds), sum(part.numel() for part in gradient.values())
    norms = list(norms) or [1.0] * n
    spread = 1 if distribution == "normal" and norms == [1.0] * n else -1
    slopes, squared, product = [0.0] * n, 0.0, 0.0
    for name, part in gradient.items():
        flat = part.flatten().double()
        raw = [DRAW[distribution](seed, name, 0, part.numel()).double() for seed in seeds]
        z = [direction / norm for direction, norm in zip(raw, norms, strict=True)]
        estimate = sum(g * direction for g, direction in zip(grads, z, strict=True)) / n
        slopes = [slope + (direction @ flat).item() for slope, direction in zip(slopes, z, strict=True)]
        squared, product = squared + (estimate @ estimate).item(), product + (estimate @ flat).item()
    norm = math.sqrt(sum(part.double().square().sum().item() for part in gradient.values()))
    error, slope = rms([g - s for g, s in zip(grads, slopes, strict=True)]), rms(slopes)
    return {
        "cosine": product / (math.sqrt(squared) * norm) if squared and norm else None,
        "expected_cosine": math.sqrt(n / (n + size + spread)),
        "projected_grad_error": error / slope if slope else None,
        "gradient_norm": norm,
    }


def used(records: Sequence[StepRecord]) -> list[StepRecord]:
    """The records that changed theta."""
    return [record for record in records if not record.update.skipped]


def rms(values: Sequence[float]) -> float:
    """Root of the mean square; 0 of nothing."""
    return math.sqrt(sum(value * value for value in values) / max(len(values), 1))
