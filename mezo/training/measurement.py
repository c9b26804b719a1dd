"""The losses of a step: its batch under every perturbation, both signs, shared among ranks and micro-batches."""

import functools
from collections import deque
from collections.abc import Sequence

import torch

from mezo.config import Config
from mezo.data.example import Example
from mezo.data.rewards import Judge
from mezo.errors import RunError
from mezo.method.batches import Batches
from mezo.method.estimator import Losses
from mezo.method.objectives import mixture, standardised
from mezo.method.schedule import learning_rate
from mezo.method.step import Step, Update
from mezo.run.trajectory import StepRecord
from mezo.runtimes.base import Runtime
from mezo.training.ranks import Ranks
from mezo_kernels import root_mean_square

RECENT = 16  # calls of the runtime whose scores are kept for the spread over a batch
SMALLEST = 2.0**-126  # normal float32
Scores = tuple[
    Sequence[int], list[tuple[torch.Tensor, torch.Tensor]]
]  # indices, and scores of both signs by perturbation


class BatchTotals:
    """What is known of a batch at the copies of a step's perturbations: micro-batches and ranks add to it.

    Args:
        count: perturbations.
        judges: names of what judges generated text.
        size: examples of the batch.
    """

    def __init__(self, count: int, judges: Sequence[str], size: int):
        self.judges, self.size = list(judges), size
        self.sums = torch.zeros(count, 2, dtype=torch.float64)  # of losses by scores, both signs
        self.verdicts = torch.zeros(count, 2, len(self.judges), size, dtype=torch.float64)  # on each example's text

    def pack(self) -> list[float]:
        """The numbers that a rank sends to the others; what it did not measure is an exact zero."""
        return [*self.sums.flatten().tolist(), *self.verdicts.flatten().tolist()]

    def unpack(self, parts: Sequence[Sequence[float]]) -> "BatchTotals":
        """The totals over ranks, from what each of them packed, in the order of ranks."""
        total = torch.tensor([sum(values) for values in zip(*parts, strict=True)], dtype=torch.float64)
        sums, verdicts = total.split([self.sums.numel(), self.verdicts.numel()])
        self.sums, self.verdicts = sums.view_as(self.sums), verdicts.view_as(self.verdicts)
        return self

    def losses(self, weights: dict[str, float], z_score: bool) -> Losses:
        """L = sum / B - sum_j w_j mean r_j of each perturbation, both signs, with B examples and judges j.

        Args:
            weights: w_j by name.
            z_score: rewards r_j are standardised over examples, perturbations and signs first.
        """
        losses = self.sums / self.size
        for name, verdicts in zip(self.judges, self.verdicts.unbind(2), strict=True):
            rewards = standardised(verdicts) if z_score else verdicts
            losses = losses - weights[name] * rewards.mean(-1)
        plus, minus = losses.unbind(1)
        return Losses(tuple(plus.tolist()), tuple(minus.tolist()))


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
        self.rule, self.half_distance = config.method.rule, config.method.half_distance
        self.labels = torch.tensor([example.label for example in examples])
        self.batches = Batches(len(examples), config.method.batch_size, config.method.seed)
        self.objective = mixture(config.method.objectives)
        self.judges = {name: judge for name, judge in judges.items() if name in config.method.objectives}
        self.recent: deque[Scores] = deque(maxlen=RECENT)
        backend = None if config.machine.backend == "auto" else config.machine.backend
        length = lambda seed: root_mean_square(runtime.spec.shapes, seed, device=runtime.device, backend=backend)  # noqa: E731
        self.norm = functools.lru_cache(256)(length) if config.method.normalise_z else None

    def step(self, number: int) -> Step:
        """The perturbations of a step."""
        config = self.config
        return Step.of_run(config.method.seed, number, config.method.num_perturbations, config.method.eps, self.norm)

    def norms(self, seeds: Sequence[int]) -> tuple[float, ...]:
        """Root mean square of each z where --normalise-z divides by it; else ()."""
        return tuple(map(self.norm, seeds)) if self.norm else ()

    def first(self, step: Step) -> Step:
        """What of a step the runtime holds when it begins: this rank's first perturbations."""
        return step.part(self._places(step)[0])

    def _places(self, step: Step) -> list[list[int]]:
        """This rank's perturbations of a step, as many at a time as the runtime holds."""
        rank, size, held = self.ranks.rank, self.ranks.size, self.runtime.pairs
        places = range(len(step)) if self.config.machine.parallel == "data" else range(rank, len(step), size)
        return [list(places[i : i + held]) for i in range(0, len(places), held)]

    def record(self, step: Step, watch: bool = False) -> StepRecord:
        """Score a step's batch and form the update.

        Args:
            step: the runtime holds its `first` perturbations.
            watch: compare what the runtime writes with the reference.
        """
        config, batch = self.config, self.batches(step.number)
        losses = self.losses(step, batch, watch)
        grads = losses.projected_grads(self.half_distance)
        lr = learning_rate(
            step.number, config.method.steps, config.method.lr, config.method.lr_schedule, config.method.warmup_steps
        )
        norms = self.norms(step.seeds)
        update = self.rule.plan(step.seeds, grads, losses, lr, config.method.weight_decay, config.method.clip, norms)
        tried = ()
        if self.rule.compares and not update.skipped:
            tried = self._try(step, update, batch, watch)
            update = self.rule.choose(update, tried)
        return StepRecord(step.number, update, losses, grads, tried)

    def _try(self, step: Step, update: Update, batch: list[int], watch: bool) -> tuple[float, ...]:
        """Losses of the batch at theta, theta - c z and theta + c z; () if c is below any float32."""
        (c,) = update.coefficients
        if abs(c) < SMALLEST:
            return ()
        recent, either_way = list(self.recent), Step(step.seeds, abs(c), step.number)
        self.runtime.perturb(either_way, watch=watch)
        tried = self.losses(either_way, batch, watch)
        (plus,), (minus,) = tried.plus, tried.minus
        self.runtime.equalise()
        (here,) = self.losses(either_way, batch).plus
        self.recent.clear()
        self.recent.extend(recent)  # the spread over a batch is that of projected_grad
        return (here, minus, plus) if c > 0 else (here, plus, minus)

    def losses(self, step: Step, batch: list[int], watch: bool = False) -> Losses:
        """Mean losses of the batch at the copies of a step, each rank having scored its part.

        Args:
            step: the runtime holds its `first` perturbations.
            batch: indices of the examples.
            watch: compare what the runtime wrote with the reference, before any loss leaves this process.
        """
        rank, size = self.ranks.rank, self.ranks.size
        by_data = self.config.machine.parallel == "data"
        mine = range(rank * len(batch) // size, (rank + 1) * len(batch) // size) if by_data else range(len(batch))
        totals = BatchTotals(len(step), self.judges, len(batch))
        for n, places in enumerate(self._places(step)):
            if n:
                self.runtime.perturb(step.part(places), watch=watch)
            self._measure(totals, places, batch, mine)
            if watch:
                check_kernels(self.runtime, step.number)
        return self._mean(totals.unpack(self.ranks.gather(totals.pack())))

    def estimate(self, step: Step) -> tuple[Step, tuple[float, ...]]:
        """This rank's perturbations of a step, and their projected_grads; other copies are written."""
        grads, batch, parts = (), self.batches(step.number), [step.part(places) for places in self._places(step)]
        for part in parts:
            self.runtime.perturb(part)
            grads += self.held_losses(len(part), batch).projected_grads(self.half_distance)
        return step.part([k for places in self._places(step) for k in places]), grads

    def held_losses(self, count: int, batch: list[int]) -> Losses:
        """Mean losses of a batch at the copies that the runtime holds, of `count` perturbations, all measured here."""
        totals = BatchTotals(count, self.judges, len(batch))
        self._measure(totals, range(count), batch, range(len(batch)))
        return self._mean(totals)

    def _mean(self, totals: BatchTotals) -> Losses:
        return totals.losses(self.config.method.objectives, self.config.method.z_score_rewards)

    def _measure(self, totals: BatchTotals, places: Sequence[int], batch: list[int], mine: Sequence[int]) -> None:
        """Add the examples at the places `mine` of a batch, at the copies that the runtime holds.

        The same z for every micro-batch.
        """
        config, size = self.config, self.config.machine.micro_batch_size or len(mine)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            indices = [batch[at] for at in part]
            scores = self.runtime.score_pairs("train", indices) if config.method.scores else []
            if scores and not self.judges:
                self.recent.append((indices, scores))
            for k, pair in zip(places, scores, strict=bool(scores)):
                for sign, option_scores in enumerate(pair):
                    totals.sums[k, sign] += self.objective(option_scores, self.labels[indices]).item() * len(part)
            if self.judges:
                self._judge(totals, places, part, indices)

    def _judge(self, totals: BatchTotals, places: Sequence[int], part: Sequence[int], indices: Sequence[int]) -> None:
        """Add what each judge says of the texts at the copies that the runtime holds."""
        texts = self.runtime.generate_pairs(
            "train", indices, self.config.method.max_new_tokens, self.config.method.stops
        )
        for k, pair in zip(places, texts, strict=True):
            for sign, outputs in enumerate(pair):
                for j, judge in enumerate(self.judges.values()):
                    for at, index, output in zip(part, indices, outputs, strict=True):
                        totals.verdicts[k, sign, j, at] = judge(self.examples[index], output)


def check_kernels(runtime: Runtime, step: int) -> None:
    """Raise RunError if what a watched step wrote differs from the reference in any bit."""
    if difference := runtime.verify():
        raise RunError(f"step {step}: the kernels disagree with the reference: {difference}; run `mezo verify`")
