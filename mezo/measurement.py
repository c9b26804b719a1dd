"""The losses of a step: its batch under every perturbation, both signs, shared among ranks and micro-batches."""

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from mezo.batches import Batches
from mezo.config import Config
from mezo.estimator import coefficients, learning_rate, projected_grad, usable
from mezo.objectives import OBJECTIVES
from mezo.parallel import Ranks
from mezo.runtimes.base import Runtime
from mezo.trajectory import StepRecord
from mezo_kernels import perturbation_seed

RECENT = 16  # calls of the runtime whose scores are kept for the spread over a batch
Scores = tuple[Sequence[int], list[tuple[Tensor, Tensor]]]  # indices, and scores of both signs by perturbation


class Measurement:
    """Forms the record of a step from the losses of its batch.

    Args:
        config: the run's.
        runtime: prepared.
        labels: of the training examples.
        ranks: the processes that share the work.

    `recent` keeps the scores of the last calls.
    """

    def __init__(self, config: Config, runtime: Runtime, labels: Tensor, ranks: Ranks):
        self.config, self.runtime, self.labels, self.ranks = config, runtime, labels, ranks
        self.batches = Batches(len(labels), config.batch_size, config.seed)
        self.objective = OBJECTIVES[config.objective]
        self.recent: deque[Scores] = deque(maxlen=RECENT)

    def record(self, step: int, watch: bool, check: Callable, interrupted: bool) -> tuple[StepRecord, bool]:
        """Score a step's batch and form the update.

        Args:
            step: the runtime holds its first perturbations.
            watch: whether the perturbations written here are kept for `check`.
            check: called after each score, before its losses leave this process.
            interrupted: whether this rank is to stop.
        Returns:
            The record, and whether any rank is to stop.
        """
        config = self.config
        seeds = tuple(perturbation_seed(config.seed, step, k) for k in range(config.num_perturbations))
        losses, stopping = self._share_losses(seeds, self.batches(step), watch, check, interrupted)
        loss_plus, loss_minus = zip(*losses, strict=True)
        grads = tuple(projected_grad(*pair, config.eps) for pair in losses)
        lr = learning_rate(step, config.steps, config.lr, config.lr_schedule, config.warmup_steps)
        steps = coefficients(grads, lr, config.clip)
        if not usable(loss_plus + loss_minus + steps):
            zeros = (0.0,) * len(seeds)
            return StepRecord(step, seeds, grads, zeros, 1.0, loss_plus, loss_minus, skipped=True), stopping
        decay = 1 - lr * config.weight_decay
        return StepRecord(step, seeds, grads, steps, decay, loss_plus, loss_minus), stopping

    def _share_losses(
        self, seeds: tuple[int, ...], batch: list[int], watch: bool, check: Callable, interrupted: bool
    ) -> tuple[list[tuple[float, float]], bool]:
        """Mean losses (plus, minus) of the batch for every seed, each rank having scored its part."""
        rank, size = self.ranks.rank, self.ranks.size
        by_data = self.config.parallel == "data"
        mine = batch[rank * len(batch) // size : (rank + 1) * len(batch) // size] if by_data else batch
        sums = [0.0] * (2 * len(seeds))
        for n, held in enumerate(self._held_together()):
            if n:
                check()
                self.runtime.step([], [seeds[k] for k in held], self.config.eps, watch=watch)
            for k, pair in zip(held, self.loss_sums(mine), strict=True):
                sums[2 * k : 2 * k + 2] = pair
            check()
        gathered = self.ranks.gather([float(interrupted), *sums])
        stopping = any(values[0] for values in gathered)
        # a rank's part that another scored is an exact zero
        total = [sum(values) / len(batch) for values in list(zip(*gathered, strict=True))[1:]]
        return list(zip(total[::2], total[1::2], strict=True)), stopping

    def estimate(self, step: int) -> tuple[list[int], list[float]]:
        """Seeds and projected_grads of a step to come, those of this rank's perturbations; other copies are written."""
        seeds, grads, eps, batch = [], [], self.config.eps, self.batches(step)
        for held in self._held_together():
            own = [perturbation_seed(self.config.seed, step, k) for k in held]
            self.runtime.step([], own, eps)
            seeds += own
            grads += [
                projected_grad(plus / len(batch), minus / len(batch), eps) for plus, minus in self.loss_sums(batch)
            ]
        return seeds, grads

    def first_seeds(self, step: int) -> list[int]:
        """Seeds of the perturbations that the runtime holds when a step begins."""
        return [perturbation_seed(self.config.seed, step, k) for k in self._held_together()[0]]

    def _held_together(self) -> list[list[int]]:
        """This rank's perturbations of a step, as many at a time as the runtime holds."""
        by_data, n = self.config.parallel == "data", self.config.num_perturbations
        mine = range(n) if by_data else range(self.ranks.rank, n, self.ranks.size)
        return [list(mine[i : i + self.runtime.pairs]) for i in range(0, len(mine), self.runtime.pairs)]

    def loss_sums(self, batch: list[int]) -> list[list[float]]:
        """Losses (plus, minus) of each perturbation held, summed over the batch: the same z for every micro-batch."""
        size = self.config.micro_batch_size or len(batch)
        sums = None
        for i in range(0, len(batch), size):
            part = batch[i : i + size]
            pairs = self.runtime.score_pairs("train", part)
            self.recent.append((part, pairs))
            sums = sums or [[0.0, 0.0] for _ in pairs]
            for own, pair in zip(sums, pairs, strict=True):
                for sign, scores in enumerate(pair):
                    own[sign] += self.objective(scores, self.labels[part]).item() * len(part)
        return sums
