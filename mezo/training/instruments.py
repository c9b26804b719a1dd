"""What projected_grad is worth, measured between steps: its noise and spread, rounding, and autograd's gradient.

Nothing here changes a run: the same log comes of it with and without.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from mezo.config import Method
from mezo.method.directions import fewest
from mezo.method.step import Step
from mezo.run.trajectory import StepRecord
from mezo.runtimes.base import Differentiable, Runtime, require
from mezo.training.clock import Clock
from mezo.training.measurement import Measurement, Scores
from mezo_kernels import ParamLayout, rademacher, standard_normal, step_

DRAW = {"normal": standard_normal, "rademacher": rademacher}

COMPARED = 8  # directions along which --follow-coherence measures the coherence
LOOKED_AT = 1 << 16  # elements of a parameter that its rounding is judged by


class Instruments:
    """Rows of metrics.jsonl about the estimate itself.

    Args:
        method: what the run does in a step.
        runtime: at theta of the step that is looked at, the next step's perturbations written.
        measurement: of a step's losses; it keeps the scores of the last steps.
        clock: what is done here is evaluation.
    """

    def __init__(self, method: Method, runtime: Runtime, measurement: Measurement, clock: Clock):
        self.method, self.runtime, self.measurement, self.clock = method, runtime, measurement, clock

    def rows(self, records: Sequence[StepRecord], metrics: Sequence[dict]) -> Iterator[dict]:
        """What is due after these records and not among the rows there are; only finite numbers.

        `noise`: of projected_grad, from scoring the same theta again, beside its root mean square since the last one.
        `spread`: standard deviation over a step's perturbations and standard error of the mean over its examples, of
        projected_grad; how much the examples' gradients agree (`coherence`), and by how much a direction for each
        example divides the variance of the estimate against one for all (`directions_gain`); under --follow-coherence
        how many directions the steps from the next one on have (`directions`); what the base's dtype
        leaves of a perturbation (`realised_perturbation`).
        `gradient`: `against_gradient`, where --true-gradient asks for it.
        """
        step = len(records)
        known = {row["split"] for row in metrics if row["step"] == step}
        wanted = {
            "gradient": self.method.true_gradient,
            "spread": self.method.noise,
            "noise": self.method.noise,
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
        eps = self.method.half_distance
        self.runtime.equalise()
        batch = self.measurement.batches(step - 1)
        once, again = (self.measurement.held_losses([0], batch) for _ in range(2))
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
        measurement, method, follows = self.measurement, self.method, self.method.follow_coherence
        first, rule = measurement.first(measurement.step(step)), method.rule
        theta, dtype = self.runtime.theta(), getattr(torch, self.runtime.spec.dtype)
        if follows:  # whatever this process did before: a run that was resumed must choose as one that was not
            measurement.recent.clear()
        if follows or (measurement.group_size == 1 and measurement.recent):  # no two examples have had one z
            measurement.recent.extend(self._under_one_z(step, COMPARED if follows else 1))
        grads = list(measurement.example_grads())
        rho, size = coherence(grads), method.batch_size
        return {
            "over_perturbations": spread_over_perturbations(records),
            "over_batch": spread_over_batch(grads, measurement.group_size),
            "coherence": rho,
            "directions_gain": None if rho is None else max(1.0, 1 + (size - 1) * rho),
            "directions": fewest(rho, size, method.directions) if follows else None,
            **realised_perturbation(theta, dtype, first.seeds[0], first.eps[0], rule.distribution, rule.one_sided),
        }

    def _under_one_z(self, step: int, directions: int) -> Iterator[Scores]:
        """Scores of the next step's batch by micro-batches, all of it along each of the step's first directions."""
        measurement, method = self.measurement, self.method
        batch = measurement.batches(step)
        size = measurement.machine.micro_batch_size or len(batch)
        compared = Step.of_run(method.seed, step, directions, method.eps, measurement.norm)
        for k in range(directions):
            self.runtime.perturb(compared.part([k]))
            for part in (batch[i : i + size] for i in range(0, len(batch), size)):
                (pair,) = self.runtime.score_pairs("train", part, [range(len(part))])
                yield [(part, pair)]
        self._restore(step)

    def _gradient(self, step: int, records: Sequence[StepRecord]) -> dict:
        """The next step's estimate beside autograd's gradient of its batch at the same theta."""
        measurement, batch = self.measurement, self.measurement.batches(step)
        whole = measurement.step(step)
        places, grads = measurement.estimate(whole)
        self._restore(step)
        groups = [batch[i : i + measurement.group_size] for i in range(0, len(batch), measurement.group_size)]
        gradients = [self._gradient_of(group) for group in groups]
        mine, norms = whole.part(places), measurement.norms(whole.part(places).seeds)
        measured = [measurement.group(k) for k in places]
        return against_gradient(mine.seeds, grads, gradients, self.method.rule.distribution, norms, measured)

    def _gradient_of(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        """Autograd's gradient of the mean loss of some training examples."""
        runtime = require(self.runtime, Differentiable, "--true-gradient")
        measurement, size, total = self.measurement, self.measurement.machine.micro_batch_size or len(examples), None
        for i in range(0, len(examples), size):
            part = examples[i : i + size]
            share, labels = len(part) / len(examples), measurement.labels[part]
            added = runtime.gradient("train", part, lambda s, n=share, y=labels: n * measurement.objective(s, y))
            total = added if total is None else {name: total[name] + added[name] for name in added}
        return total

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


def spread_over_batch(example_grads: Sequence[torch.Tensor], size: int) -> float | None:
    """Standard error of projected_grad as a mean over examples, pooled over the last steps.

    Args:
        example_grads: of each z, the projected_grad of each example: see `Measurement.example_grads`.
        size: examples that one projected_grad is the mean over.
    Returns:
        sqrt(pooled variance / size); None below two examples.
    """
    squares, freedom = 0.0, 0
    for grads in example_grads:
        squares, freedom = squares + (grads - grads.mean()).square().sum().item(), freedom + len(grads) - 1
    return math.sqrt(squares / freedom / size) if freedom else None


def coherence(example_grads: Sequence[torch.Tensor]) -> float | None:
    """How much the gradients g_i of the examples agree: rho = |mean g_i|^2 / mean |g_i|^2, 1 where all are equal.

    Along one z the projected_grads c_i = z . g_i of two examples have E[c_i c_j] = g_i . g_j and E[c_i^2] = |g_i|^2, so
    the mean of c_i c_j over pairs of examples, over that of c_i^2, estimates rho; it may come out below 0.

    With a direction for each of B examples the estimate's variance is 1 + (B - 1) rho times smaller than with one for
    all of them: d/B mean |g_i|^2 against d |mean g_i|^2 + d/B (mean |g_i|^2 - |mean g_i|^2), d parameters.

    Args:
        example_grads: of each z, the projected_grad of each example, two or more.

    >>> coherence([torch.tensor([2.0, 2.0, 2.0])]), coherence([torch.tensor([1.0, -1.0])]), coherence([])
    (1.0, -1.0, None)
    """
    products = squares = 0.0
    for grads in example_grads:
        square = grads.square().sum().item()
        products += (grads.sum().item() ** 2 - square) / (len(grads) - 1)
        squares += square
    return products / squares if squares else None


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
    gradients: Sequence[dict[str, torch.Tensor]],
    distribution: str = "normal",
    norms: Sequence[float] = (),
    groups: Sequence[int] = (),
) -> dict:
    """The estimate mean_k projected_grad_k z_k against the gradient itself.

    Args:
        seeds: of z_k.
        grads: projected_grad of each.
        gradients: of each group of the batch, by canonical name, on the CPU; grad is their mean.
        distribution: of z.
        norms: what each z was divided by; () if nothing.
        groups: number of the group that each projected_grad was measured on; () if there is one.
    Returns:
        cosine: of the angle between the two; in d dimensions about sqrt(n / (n + d + 1)), `expected_cosine`, is all
        that n random directions can give (E[g z] = grad, E|g z|^2 = (d + 2) |grad|^2); sqrt(n / (n + d - 1)) for z of
        one length (E|g z|^2 = d |grad|^2). Of groups with gradients g_i, whose directions differ, n times
        |grad|^2 / mean |g_i|^2 stands for n.
        projected_grad_error: root mean square of projected_grad_k - z_k . g_i over that of z_k . g_i: what finite
        eps, rounding and noise add. gradient_norm: |grad|.

    >>> gradient = {"w": torch.tensor([1.0, 2.0])}
    >>> (z,) = torch.stack([standard_normal(7, "w", 0, 2)])
    >>> found = against_gradient([7], [float(z @ gradient["w"])], [gradient])
    >>> round(found["gradient_norm"] ** 2), found["expected_cosine"], found["projected_grad_error"] < 1e-6
    (5, 0.5, True)
    """
    n, size = len(seeds), sum(part.numel() for part in gradients[0].values())
    norms, groups = list(norms) or [1.0] * n, list(groups) or [0] * n
    spread = 1 if distribution == "normal" and norms == [1.0] * n else -1
    slopes, squared, product, whole, of_groups = [0.0] * n, 0.0, 0.0, 0.0, 0.0
    for name, part in gradients[0].items():
        parts = torch.stack([gradient[name].flatten().double() for gradient in gradients])
        raw = [DRAW[distribution](seed, name, 0, part.numel()).double() for seed in seeds]
        z = [direction / norm for direction, norm in zip(raw, norms, strict=True)]
        estimate, mean = sum(g * direction for g, direction in zip(grads, z, strict=True)) / n, parts.mean(0)
        slopes = [slope + (z[k] @ parts[groups[k]]).item() for k, slope in enumerate(slopes)]
        squared, product = squared + (estimate @ estimate).item(), product + (estimate @ mean).item()
        whole, of_groups = whole + (mean @ mean).item(), of_groups + parts.square().sum().item() / len(parts)
    norm, agreement = math.sqrt(whole), whole / of_groups if of_groups else 1.0
    error, slope = rms([g - s for g, s in zip(grads, slopes, strict=True)]), rms(slopes)
    return {
        "cosine": product / (math.sqrt(squared) * norm) if squared and norm else None,
        "expected_cosine": math.sqrt(n * agreement / (n * agreement + size + spread)),
        "projected_grad_error": error / slope if slope else None,
        "gradient_norm": norm,
    }


def used(records: Sequence[StepRecord]) -> list[StepRecord]:
    """The records that changed theta."""
    return [record for record in records if not record.update.skipped]


def rms(values: Sequence[float]) -> float:
    """Root of the mean square; 0 of nothing."""
    return math.sqrt(sum(value * value for value in values) / max(len(values), 1))
