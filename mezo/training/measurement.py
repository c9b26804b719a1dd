"""The losses of a step: its batch under every perturbation, both signs, shared among ranks and micro-batches."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mezo.config import Config
from mezo.config.checks import FLOAT32, STATEFUL
from mezo.data.example import Example
from mezo.data.rewards import Judge
from mezo.method.batches import Batches
from mezo.method.estimator import best_of_three, planned, projected_grad, usable
from mezo.method.objectives import mixture, standardised
from mezo.method.step import StepUpdate
from mezo.run.trajectory import StepRecord
from mezo.runtimes.base import Runtime
from mezo.training.ranks import Ranks
from mezo_kernels import perturbation_seed, root_mean_square

RECENT = 16  # calls of the runtime whose scores are kept for the spread over a batch
Scores = tuple[
    Sequence[int], list[tuple[torch.Tensor, torch.Tensor]]
]  # indices, and scores of both signs by perturbation


class Measurement:
    """Forms the record of a step from the losses of its batch.

    Args:
        config: the run's.
        runtime: prepared.
        examples: to train on.
        judges: of generated text, by the name of the objective.
        ranks: the processes that share the work.

    `recent` keeps the scores of the last calls.
    """

    def __init__(
        self, config: Config, runtime: Runtime, examples: Sequence[Example], judges: dict[str, Judge], ranks: Ranks
    ):
        self.config, self.runtime, self.examples, self.ranks = config, runtime, examples, ranks
        self.labels = torch.tensor([example.label for example in examples])
        self.batches = Batches(len(examples), config.batch_size, config.seed)
        self.objective = mixture(config.objectives)
        self.judges = {name: judge for name, judge in judges.items() if name in config.objectives}
        self.recent: deque[Scores] = deque(maxlen=RECENT)
        backend = None if config.backend == "auto" else config.backend
        self._rms = functools.lru_cache(256)(
            lambda seed: root_mean_square(runtime.spec.shapes, seed, device=runtime.device, backend=backend)
        )

    def step(self, updates: Sequence[StepUpdate], seeds: Sequence[int], watch: bool = False) -> None:
        """Apply updates and write the perturbed copies of these seeds, at most `runtime.pairs`."""
        eps, norms = self.config.eps, self.norms(seeds)
        self.runtime.step(updates, seeds, [eps / norm for norm in norms] if norms else eps, watch=watch)

    def norms(self, seeds: Sequence[int]) -> tuple[float, ...]:
        """Root mean square of each z where --normalise-z divides by it; else ()."""
        return tuple(map(self._rms, seeds)) if self.config.normalise_z else ()

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
        batch = self.batches(step)
        losses, stopping = self._share_losses(seeds, batch, watch, check, interrupted)
        loss_plus, loss_minus = zip(*losses, strict=True)
        grads = tuple(projected_grad(*pair, config.half_distance) for pair in losses)
        steps, decay, lr = planned(config, step, grads, loss_plus, self.norms(seeds))
        if not usable(loss_plus + loss_minus + steps):
            zeros = (0.0,) * len(seeds)
            return StepRecord(step, seeds, grads, zeros, 1.0, loss_plus, loss_minus, skipped=True), stopping
        record = StepRecord(step, seeds, grads, steps, decay, loss_plus, loss_minus)
        if config.update_rule in STATEFUL:
            return replace(record, lr=lr), stopping
        if config.update_rule == "conservative":
            tried = self._try(seeds, abs(steps[0]), batch, watch, check)
            tried = (tried[0], *tried[:0:-1]) if tried and steps[0] < 0 else tried
            return replace(record, coefficients=best_of_three(steps[0], tried)[0], tried=tried), stopping
        return record, stopping

    def _try(self, seeds: tuple[int, ...], size: float, batch: list[int], watch: bool, check: Callable) -> tuple:
        """Losses of the batch at theta, theta - size z and theta + size z; () if the size is below any float32."""
        if size < FLOAT32[0]:
            return ()
        recent = list(self.recent)
        self.runtime.step([], seeds, size, watch=watch)
        ((plus, minus),), _ = self._share_losses(seeds, batch, watch, check, False)
        self.runtime.equalise()
        ((here, _),), _ = self._share_losses(seeds, batch, False, lambda: None, False)
        self.recent.clear()
        self.recent.extend(recent)  # the spread over a batch is that of projected_grad
        return here, minus, plus

    def _share_losses(
        self, seeds: tuple[int, ...], batch: list[int], watch: bool, check: Callable, interrupted: bool
    ) -> tuple[list[tuple[float, float]], bool]:
        """Mean losses (plus, minus) of the batch for every seed, each rank having scored its part."""
        rank, size = self.ranks.rank, self.ranks.size
        by_data = self.config.parallel == "data"
        mine = range(rank * len(batch) // size, (rank + 1) * len(batch) // size) if by_data else range(len(batch))
        width = 1 + len(self.judges) * len(batch)
        rows = [[[0.0] * width] * 2] * len(seeds)
        for n, held in enumerate(self._held_together()):
            if n:
                self.step([], [seeds[k] for k in held], watch)
            for k, pair in zip(held, self._measure(batch, mine), strict=True):
                rows[k] = pair
            check()
        numbers = itertools.chain.from_iterable(row for pair in rows for row in pair)
        gathered = self.ranks.gather([float(interrupted), *numbers])
        stopping = any(values[0] for values in gathered)
        # a rank's part that another scored is an exact zero
        total = torch.tensor([sum(values) for values in list(zip(*gathered, strict=True))[1:]], dtype=torch.float64)
        return self._losses(total.view(len(seeds), 2, width), len(batch)), stopping

    def estimate(self, step: int) -> tuple[list[int], list[float]]:
        """Seeds and projected_grads of a step to come, those of this rank's perturbations; other copies are written."""
        seeds, grads, batch = [], [], self.batches(step)
        for held in self._held_together():
            own = [perturbation_seed(self.config.seed, step, k) for k in held]
            self.step([], own)
            seeds += own
            grads += [projected_grad(*pair, self.config.half_distance) for pair in self.mean_losses(batch)]
        return seeds, grads

    def first_seeds(self, step: int) -> list[int]:
        """Seeds of the perturbations that the runtime holds when a step begins."""
        return [perturbation_seed(self.config.seed, step, k) for k in self._held_together()[0]]

    def _held_together(self) -> list[list[int]]:
        """This rank's perturbations of a step, as many at a time as the runtime holds."""
        by_data, n = self.config.parallel == "data", self.config.num_perturbations
        mine = range(n) if by_data else range(self.ranks.rank, n, self.ranks.size)
        return [list(mine[i : i + self.runtime.pairs]) for i in range(0, len(mine), self.runtime.pairs)]

    def mean_losses(self, batch: list[int]) -> list[tuple[float, float]]:
        """Mean losses (plus, minus) of a batch under each perturbation held, all of it measured here."""
        return self._losses(torch.tensor(self._measure(batch, range(len(batch))), dtype=torch.float64), len(batch))

    def _measure(self, batch: list[int], places: Sequence[int]) -> list[list[list[float]]]:
        """What is known of the examples at `places` of a batch: a row for each perturbation held and each sign.

        A row is the sum of their losses by scores, then what each judge says of each example's text, 0 elsewhere in
        the batch. The same z for every micro-batch.
        """
        config, size, rows = self.config, self.config.micro_batch_size or len(places), None
        for start in range(0, len(places), size):
            part = places[start : start + size]
            indices = [batch[place] for place in part]
            scores = self.runtime.score_pairs("train", indices) if config.scores else []
            if scores and not self.judges:
                self.recent.append((indices, scores))
            texts = []
            if self.judges:
                texts = self.runtime.generate_pairs("train", indices, config.max_new_tokens, config.stops)
            width = 1 + len(self.judges) * len(batch)
            rows = rows or [[[0.0] * width for _ in range(2)] for _ in scores or texts]
            for own, pair in zip(rows, scores, strict=False):
                for row, option_scores in zip(own, pair, strict=True):
                    row[0] += self.objective(option_scores, self.labels[indices]).item() * len(part)
            for own, pair in zip(rows, texts, strict=False):
                for row, outputs in zip(own, pair, strict=True):
                    self._judge(row, len(batch), part, indices, outputs)
        return rows

    def _judge(self, row: list[float], size: int, places: Sequence[int], indices: Sequence[int], outputs) -> None:
        for n, judge in enumerate(self.judges.values()):
            for place, index, output in zip(places, indices, outputs, strict=True):
                row[1 + n * size + place] = judge(self.examples[index], output)

    def _losses(self, rows: torch.Tensor, size: int) -> list[tuple[float, float]]:
        """L = sum / B - sum_i w_i mean r_i of each perturbation, both signs.

        Args:
            rows: (perturbations, 2, 1 + judges * size), as `_measure` makes them, whole.
            size: B, examples of the batch.
        """
        losses, values = rows[:, :, 0] / size, rows[:, :, 1:].unflatten(-1, (len(self.judges), size))
        for name, own in zip(self.judges, values.unbind(2), strict=True):
            own = standardised(own) if self.config.z_score_rewards else own
            losses = losses - self.config.objectives[name] * own.mean(-1)
        return [tuple(pair) for pair in losses.tolist()]
