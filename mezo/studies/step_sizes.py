"""A sensible eps and lr before a run, from a few dozen forward passes: the noise of the loss against its curvature."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mezo.config import Config
from mezo.data.example import Example
from mezo.data.rewards import Judge
from mezo.method.estimator import projected_grad
from mezo.method.step import Step
from mezo.runtimes.base import Runtime
from mezo.training.instruments import rms, spread_over_batch
from mezo.training.measurement import Measurement
from mezo.training.ranks import Ranks
from mezo_kernels import perturbation_seed

DIRECTIONS, NOISE_DIRECTIONS = 16, 4
FINE = {"float32": 1e-2}  # of eps: the distance of points whose losses differ by noise alone, a tenth in 16 bits
EPS_RANGE = 1e-4, 1e-1
LEAST_SHARE = 0.1  # of projected_grad's square that is taken for signal however small it seems


@dataclass(frozen=True)
class StepSizes:
    """What was measured at theta_0, and what follows from it.

    Args:
        loss: mean.
        loss_noise: standard deviation of a loss as computed.
        slope: root mean square of projected_grad.
        signal: share of its square that is not due to which examples were drawn.
        curvature: root mean square of z.Hz, which is tr H or more.
        third: root mean square of the third derivative along z.
        eps: where the bias of a two-sided difference and the noise in it balance.
        lr: of the best step from theta_0 that this curvature allows; None where there is no slope or no curvature.
    """

    loss: float
    loss_noise: float
    slope: float
    signal: float
    curvature: float
    third: float
    eps: float
    lr: float | None


def estimate(
    config: Config, runtime: Runtime, examples: Sequence[Example], judged: dict[str, Judge] | None = None
) -> StepSizes:
    """Measure at the theta the runtime holds.

    Noise: theta + i h z for i = -3 .. 3 with a small h; fourth differences of the losses are noise, of variance 70
    sigma^2 (ECnoise: Moré and Wild, SIAM J. Sci. Comput. 33, 2011). Derivatives along z: losses at theta, +- eps and
    +- 2 eps. eps: |L'''| eps^2 / 6 of bias and sigma / (sqrt(2) eps) of noise have the least sum at eps^3 = 3 sigma /
    (sqrt(2) |L'''|) (Gill, Murray, Saunders and Wright, SIAM J. Sci. Stat. Comput. 4, 1983).
    lr: the expected loss after a step of plain MeZO is L - lr |grad|^2 + lr^2 / 2 E[g^2 z.Hz], with E[g^2] = |grad|^2 /
    signal; were z.Hz the same along every z it would be least at lr = signal / z.Hz. LoRA's loss is curved up along
    some z and down along others, hence the root mean square, a cautious one. n perturbations allow n times that.

    Args:
        config: its eps is where the derivatives are taken.
        runtime: holds theta_0; its perturbed copies are overwritten.
        examples: to train on.
        judged: judges of generated text, by the name of the objective.
    """
    probe = _Probe(config, runtime, examples, judged or {})
    fine = config.method.eps * FINE.get(runtime.spec.dtype, 0.1)
    noise = [n for k in range(NOISE_DIRECTIONS) for n in fourth_differences(probe.line(k, fine, 3))]
    lines = [probe.line(k, config.method.eps, 2) for k in range(DIRECTIONS)]
    loss, slopes, curvatures, thirds = zip(*(derivatives(line, config.method.eps) for line in lines), strict=True)
    sigma = max(rms(noise) / math.sqrt(70), 2**-53 * abs(loss[0]))
    slope, third = rms(slopes), max(rms(thirds), 1e-30)
    error = spread_over_batch(probe.example_grads, config.method.batch_size) or 0.0
    signal = max(1 - (error / slope) ** 2, LEAST_SHARE) if slope else LEAST_SHARE
    curvature = rms(curvatures)
    eps = min(max((3 * sigma / (math.sqrt(2) * third)) ** (1 / 3), EPS_RANGE[0]), EPS_RANGE[1])
    lr = rounded(config.method.num_perturbations * signal / curvature) if curvature and slope else None
    return StepSizes(sum(loss) / len(loss), sigma, slope, signal, curvature, third, rounded(eps), lr)


class _Probe:
    """Losses along the directions and batches of the first steps."""

    def __init__(self, config: Config, runtime: Runtime, examples: Sequence[Example], judged: dict[str, Judge]):
        self.config, self.runtime = config.replace(directions=1), runtime  # z is the same for a whole batch
        self.measurement = Measurement(self.config.method, config.machine, runtime, examples, judged, Ranks())
        self.example_grads: list[torch.Tensor] = []

    def line(self, k: int, distance: float, reach: int) -> list[float]:
        """Losses at theta + i distance z, i = -reach .. reach, on the batch of step k.

        Args:
            k: step whose batch and direction z are taken, from 0.
            distance: between neighbouring points, in lengths of z.
            reach: points on either side of theta.
        """
        batch, seed = self.measurement.batches(k), perturbation_seed(self.config.method.seed, k, 0)
        above, below = [], []
        for i in range(1, reach + 1):
            self.runtime.perturb(Step([seed], i * distance))
            self.measurement.recent.clear()
            losses = self.measurement.held_losses([0], batch)
            if distance == self.config.method.eps and i == 1:
                self.example_grads += self.measurement.example_grads()
            above += losses.plus
            below += losses.minus
        self.runtime.equalise()
        return [*below[::-1], *self.measurement.held_losses([0], batch).plus, *above]


def fourth_differences(losses: list[float]) -> list[float]:
    """The fourth differences of a series.

    >>> fourth_differences([0.0, 1.0, 8.0, 27.0, 64.0, 126.0])
    [0.0, 1.0]
    """
    for _ in range(4):
        losses = [b - a for a, b in itertools.pairwise(losses)]
    return losses


def derivatives(losses: list[float], eps: float) -> tuple[float, float, float, float]:
    """(L, L', L'', L''') at the middle of five points eps apart, by central differences.

    >>> derivatives([x**3 + 2 * x for x in (-2.0, -1.0, 0.0, 1.0, 2.0)], 1.0)
    (0.0, 3.0, 0.0, 6.0)
    """
    far_below, below, centre, above, far_above = losses
    near, far = projected_grad(above, below, eps), projected_grad(far_above, far_below, 2 * eps)
    # near = L' + L''' eps^2 / 6, far = L' + L''' 4 eps^2 / 6
    return centre, near, (above - 2 * centre + below) / eps**2, 2 * (far - near) / eps**2


def rounded(value: float) -> float:
    """To one significant digit.

    >>> rounded(0.00317)
    0.003
    """
    return float(f"{value:.1g}")
