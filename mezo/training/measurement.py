"""The losses of a step: its batch under every perturbation, both signs, shared among ranks and micro-batches."""

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from mezo.config import Machine, Method
from mezo.data.example import Example
from mezo.data.large import LargeExamples, labels_of
from mezo.data.rewards import Judge
from mezo.errors import RunError, UserError
from mezo.method.batches import Batches
from mezo.method.estimator import Losses
from mezo.method.guard import StepGuard
from mezo.method.objectives import centred, mixture, standardised
from mezo.method.sampling import Sampling, text_seed
from mezo.method.schedule import learning_rate
from mezo.method.step import Step, Update
from mezo.run.feedback import FILE, FeedbackLog
from mezo.run.files import RESTORE
from mezo.run.trajectory import StepRecord
from mezo.runtimes.base import Grows, Runtime, require
from mezo.training.ranks import Ranks
from mezo_kernels import inner_products, root_mean_square

RECENT = 16  # calls of the runtime whose scores are kept for the spread over a batch
SMALLEST = 2.0**-126  # normal float32
Scores = list[tuple[Sequence[int], tuple[torch.Tensor, torch.Tensor]]]
"""Of one call of a runtime, by perturbation: numbers of the examples, and their scores at both signs."""


class BatchTotals:
    """What is known of a batch at the copies of a step's perturbations: micro-batches and ranks add to it.

    Args:
        places: numbers of the perturbations in the step.
        judges: names of what judges generated text.
        size: examples that are measured under each perturbation.
        groups: of each perturbation, the part of the batch that it is measured on.
    """

    def __init__(self, places: Sequence[int], judges: Sequence[str], size: int, groups: Sequence[int]):
        self.judges, self.size, self.groups = list(judges), size, list(groups)
        self.row, count = {k: row for row, k in enumerate(places)}, len(places)
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

    def losses(self, weights: dict[str, float], z_score: bool, center: bool = False) -> Losses:
        """L = sum / n - sum_j w_j mean r_j of each perturbation, both signs, with n examples and judges j.

        Args:
            weights: w_j by name.
            z_score: rewards r_j are standardised over examples, perturbations and signs first.
            center: before that, the mean over the texts of its prompt is taken from each.
        """
        losses = self.sums / self.size
        for name, verdicts in zip(self.judges, self.verdicts.unbind(2), strict=True):
            rewards = centred(verdicts, self.groups) if center else verdicts
            rewards = standardised(rewards) if z_score else rewards
            losses = losses - weights[name] * rewards.mean(-1)
        plus, minus = losses.unbind(1)
        return Losses(tuple(plus.tolist()), tuple(minus.tolist()))


class Measurement:
    """Forms the record of a step from the losses of its batch.

    Args:
        method, machine: groups of the run's configuration.
        runtime: prepared.
        examples: to train on.
        judges: of generated text, by the name of the objective.
        ranks: the processes that share the work.
        feedback: what the run was fed beside its examples, if it may be.

    `recent` keeps the scores of the last calls; `see` must be told the steps that are done already.
    """

    def __init__(
        self,
        method: Method,
        machine: Machine,
        runtime: Runtime,
        examples: Sequence[Example],
        judges: dict[str, Judge],
        ranks: Ranks,
        feedback: FeedbackLog | None = None,
    ):
        self.method, self.machine, self.runtime = method, machine, runtime
        self.examples, self.ranks = examples, ranks
        self.feedback, self.fed = feedback, 0  # lines of it that epochs draw from
        self.rule, self.half_distance = method.rule, method.half_distance
        self.labels = torch.as_tensor(labels_of(examples), dtype=torch.int64)
        self.directions = method.directions  # of the next step; --follow-coherence changes it
        self.group = lambda k: k // method.num_perturbations  # of the batch, that perturbation k measures
        self.mine = self._mine(method.batch_size)
        self.batches = Batches(len(examples), method.batch_size, method.seed)
        self.objective = mixture(method.objectives)
        self.judges = {name: judge for name, judge in judges.items() if name in method.objectives}
        self.recent: deque[Scores] = deque(maxlen=RECENT)
        self.moments: list[float] = []  # of a rule that remembers
        self.guard = StepGuard(method.max_step_ratio)
        backend = None if machine.backend == "auto" else machine.backend
        length = lambda seed: root_mean_square(runtime.spec.shapes, seed, device=runtime.device, backend=backend)  # noqa: E731
        self.norm = functools.lru_cache(256)(length) if method.normalise_z else None
        self.drawing = {"device": runtime.device, "backend": backend}

    def see(self, record: StepRecord) -> None:
        """A step is done: what those after it follow from.

        Raises:
            UserError: it drew from feedback that is not there.
        """
        self.guard.see(record.update)
        if not record.update.skipped:
            grads = record.projected_grads
            self.moments, _ = self.rule.remember(self.moments, record.step, grads, self.method.clip)
        if not record.fed:
            return
        if self.feedback is None or not self.feedback.holds(*record.fed):
            lines = record.fed[0]
            raise UserError(f"step {record.step} drew from {lines} lines of {FILE}, which are not there; {RESTORE}")
        self._draw_from(record.fed[0], record.step)

    def step(self, number: int) -> Step:
        """The perturbations of a step."""
        method = self.method
        count = self.directions * method.num_perturbations
        return Step.of_run(method.seed, number, count, method.eps, self.norm, self.rule.period)

    @property
    def group_size(self) -> int:
        """Examples that a perturbation of the next step is measured on."""
        return self.method.batch_size // self.directions

    def norms(self, seeds: Sequence[int]) -> tuple[float, ...]:
        """Root mean square of each z where --normalise-z divides by it; else ()."""
        return tuple(map(self.norm, seeds)) if self.norm else ()

    def products(self, seeds: Sequence[int]) -> list[list[float]]:
        """Inner products of the z, for a rule that needs them; else []."""
        if not self.rule.projects:
            return []
        return inner_products(self.runtime.spec.shapes, seeds, **self.drawing).tolist()

    def first(self, step: Step) -> Step:
        """What of a step the runtime holds when it begins: this rank's first perturbations."""
        return step.part(self._places(step)[0])

    def _places(self, step: Step) -> list[list[int]]:
        """This rank's perturbations of a step, as many at a time as the runtime holds."""
        rank, size, held = self.ranks.rank, self.ranks.size, self.runtime.pairs
        if self.machine.parallel == "data":
            groups = {at // self.group_size for at in self.mine}
            places = [k for k in range(len(step)) if self.group(k) in groups]
        else:
            places = range(rank, len(step), size)
        return [list(places[i : i + held]) for i in range(0, len(places), held)]

    def _mine(self, size: int) -> range:
        """Places of a batch of so many examples that this rank measures."""
        rank, ranks = self.ranks.rank, self.ranks.size
        by_data = self.machine.parallel == "data"
        return range(rank * size // ranks, (rank + 1) * size // ranks) if by_data else range(size)

    def record(self, step: Step, watch: bool = False) -> StepRecord:
        """Score a step's batch and form the update.

        Args:
            step: the runtime holds its `first` perturbations.
            watch: compare what the runtime writes with the reference.
        """
        fed = self._join(step.number)
        method, batch = self.method, self.batches(step.number)
        losses = self.losses(step, batch, watch)
        losses = losses.against_mean() if self.rule.guides else losses
        grads = losses.projected_grads(self.half_distance)
        lr = learning_rate(step.number, method.steps, method.lr, method.lr_schedule, method.warmup_steps)
        norms = self.norms(step.seeds)
        products = self.products(step.seeds)
        tried = self._try_along(step, losses, batch, watch) if self.rule.guides else ()
        slopes = self.rule.slopes(grads, tried, method.eps)
        moments, slopes = self.rule.remember(self.moments, step.number, slopes, method.clip)
        update = self.rule.plan(step.seeds, slopes, losses, lr, method.weight_decay, method.clip, norms, products)
        update, factor = self.guard.shorten(update)
        if self.rule.compares and not update.skipped:
            tried = self._try(step, update, batch, watch)
            update = self.rule.choose(update, tried)
        self.guard.see(update)
        self.moments = self.moments if update.skipped else moments
        sampling = self._sampling(step.number)
        return StepRecord(step.number, update, losses, grads, tried, factor, fed, sampling and sampling.seed)

    def _sampling(self, number: int) -> Sampling | None:
        """How the texts of a step are sampled; None where they are not."""
        method = self.method
        return Sampling(method.temperature, text_seed(method.seed, number)) if method.temperature else None

    def _join(self, step: int) -> tuple[int, str] | tuple[()]:
        """Let an epoch that begins in a step's batch hold what the run was fed by then; returns `StepRecord.fed`."""
        if self.feedback is None or not self.batches.begins_epoch(step):
            return ()
        lines = self.feedback.before(step)
        if lines == self.fed:
            return ()
        self._draw_from(lines, step)
        return lines, self.feedback.hash_of(lines)

    def _draw_from(self, lines: int, step: int) -> None:
        """Let epochs from a step on hold the examples of so many lines of what the run was fed."""
        further = self.feedback.examples(self.fed, lines)
        self.fed = lines
        if not further:
            return
        if isinstance(self.examples, LargeExamples):
            raise UserError(f"{FILE}: a training set that is read as it is drawn takes no further examples; {RESTORE}")
        require(self.runtime, Grows, "a run that was fed", other="sglang").grow("train", further)
        self.examples = [*self.examples, *further]
        self.labels = torch.as_tensor(labels_of(self.examples), dtype=torch.int64)
        self.batches.grow(step, len(self.examples))

    def _try_along(self, step: Step, losses: Losses, batch: list[int], watch: bool) -> tuple[float, ...]:
        """Losses of the batch at theta + eps v and theta - eps v, v the step's contrast; () if one is not finite."""
        if not all(map(math.isfinite, losses.plus)):
            return ()
        along = dataclasses.replace(step, weights=self.rule.contrast(losses))
        self.runtime.perturb(along, watch=watch)
        found = self.losses(along, batch, watch)
        return found.plus + found.minus

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
        totals = self._totals(range(len(step)))
        for n, places in enumerate(self._places(step)):
            if n:
                self.runtime.perturb(step.part(places), watch=watch)
            self._measure(totals, places, batch, self.mine, step.number)
            if watch:
                check_kernels(self.runtime, step.number)
        return self._mean(totals.unpack(self.ranks.gather(totals.pack())))

    def estimate(self, step: Step) -> tuple[list[int], tuple[float, ...]]:
        """Numbers of this rank's perturbations of a step, and their projected_grads; other copies are written."""
        grads, batch = (), self.batches(step.number)
        for places in self._places(step):
            self.runtime.perturb(step.part(places))
            grads += self.held_losses(places, batch, step.number).projected_grads(self.half_distance)
        return [k for places in self._places(step) for k in places], grads

    def held_losses(self, places: Sequence[int], batch: list[int], number: int = 0) -> Losses:
        """Mean losses at the copies that the runtime holds, all measured here.

        Args:
            places: numbers, in a step, of the perturbations that the copies are taken for.
            batch: indices of the examples.
            number: of the step whose random numbers texts are sampled by.
        """
        totals = self._totals(places)
        self._measure(totals, places, batch, range(len(batch)), number)
        return self._mean(totals)

    def _totals(self, places: Sequence[int]) -> BatchTotals:
        return BatchTotals(places, self.judges, self.group_size, [self.group(k) for k in places])

    def example_grads(self) -> Iterator[torch.Tensor]:
        """projected_grad of each example, float64 (examples,), of every z that several examples had in the last calls.

        Those that are not finite are left out.
        """
        half = self.method.eps if self.rule.guides else self.half_distance
        for indices, pair in itertools.chain.from_iterable(self.recent):
            if len(indices) > 1:
                losses = torch.stack([self.objective(s, self.labels[indices], "none") for s in pair])
                grads = losses.diff(dim=0)[0] / (2 * half)
                if grads.isfinite().all():
                    yield grads

    def _mean(self, totals: BatchTotals) -> Losses:
        return totals.losses(self.method.objectives, self.method.z_score_rewards, self.method.center_rewards)

    def _measure(
        self, totals: BatchTotals, places: Sequence[int], batch: list[int], mine: Sequence[int], number: int
    ) -> None:
        """Add the examples at the places `mine` of a batch of step `number`, at the copies that the runtime holds.

        The same z for every micro-batch.
        """
        groups = {self.group(k) for k in places}
        mine = [at for at in mine if at // self.group_size in groups]
        size = self.machine.micro_batch_size or len(mine)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            owners = {group: [] for group in groups}
            for i, at in enumerate(part):
                owners[at // self.group_size].append(i)
            owned = [owners[self.group(k)] for k in places]
            call = ("train", [batch[at] for at in part], None if len(groups) == 1 else owned)
            at = {k: [part[i] for i in each] for k, each in zip(places, owned, strict=True)}
            if self.method.scores:
                self._score(totals, at, batch, call)
            if self.judges:
                self._judge(totals, at, batch, call, self._sampling(number))

    def _score(self, totals: BatchTotals, at: dict[int, list[int]], batch: list[int], call: tuple) -> None:
        """Add the losses by scores at the copies that the runtime holds.

        Args:
            totals: to add to.
            at: by perturbation, places in the batch.
            batch: indices of the examples.
            call: arguments of the runtime that ask for these.
        """
        indices = [[batch[place] for place in places] for places in at.values()]
        scores: Scores = list(zip(indices, self.runtime.score_pairs(*call), strict=True))
        totals.sums[[totals.row[k] for k in at]] += self._losses_of(scores)
        if not self.judges and any(plus is not minus for _, (plus, minus) in scores):
            self.recent.append(scores)

    def _losses_of(self, scores: Scores) -> torch.Tensor:
        """Sums over its examples of the loss at both signs, by perturbation, float64 (perturbations, 2)."""
        if all(len(indices) == 1 for indices, _ in scores) and len({s.shape for _, pair in scores for s in pair}) == 1:
            labels = self.labels[[i for (i,), _ in scores]]
            sides = zip(*(pair for _, pair in scores), strict=True)
            return torch.stack([self.objective(torch.cat(side), labels, "none") for side in sides], -1)
        sums = torch.zeros(len(scores), 2, dtype=torch.float64)
        for row, (indices, pair) in enumerate(scores):
            for sign, side in enumerate(pair if indices else ()):
                sums[row, sign] = self.objective(side, self.labels[indices]).item() * len(indices)
        return sums

    def _judge(
        self,
        totals: BatchTotals,
        at: dict[int, list[int]],
        batch: list[int],
        call: tuple,
        sampling: Sampling | None,
    ) -> None:
        """Add what each judge says of the texts at the copies that the runtime holds. See `_score`."""
        split, indices, owned = call
        method = self.method
        texts = self.runtime.generate_pairs(split, indices, method.max_new_tokens, method.stops, owned, sampling)
        for (k, places), pair in zip(at.items(), texts, strict=True):
            for sign, outputs in enumerate(pair):
                for j, judge in enumerate(self.judges.values()):
                    for place, output in zip(places, outputs, strict=True):
                        verdict = judge(self.examples[batch[place]], output)
                        totals.verdicts[totals.row[k], sign, j, place % self.group_size] = verdict


def check_kernels(runtime: Runtime, step: int) -> None:
    """Raise RunError if what a watched step wrote differs from the reference in any bit."""
    if difference := runtime.verify():
        raise RunError(f"step {step}: the kernels disagree with the reference: {difference}; run `mezo verify`")
