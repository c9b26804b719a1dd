"""The in-process runtime: transformers computes the losses, the trunk cache saves what theta cannot change."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from mezo.config import HF, Machine, Model, Workload
from mezo.data.example import Example
from mezo.data.large import LargeExamples, looked_at
from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.full import save_model
from mezo.models.linear import Product, add_adapters_in_place, choose, pack, tell, why_not_packed, width_of
from mezo.models.load import Checkpoint
from mezo.models.lora import as_peft_loads
from mezo.models.parts import load_parts
from mezo.progress import say
from mezo.runtimes.base import TokenCount
from mezo.runtimes.generation import Writing, decoder_of, greedy, greedy_by_decoder, refuse_too_long
from mezo.runtimes.hf.proof import StartProof
from mezo.runtimes.hf.reading import ByModel, ByParts, Reading
from mezo.runtimes.hf.rowwise import RowsLost, RowWise, why_not
from mezo.runtimes.hf.trunk import CALL, Trunk, attention_of, no_cache
from mezo.runtimes.reference import reference_log_probs
from mezo.runtimes.rows import (
    LargeRows,
    RowBatch,
    by_length,
    first_rows,
    measured,
    option_scores,
    rows_by_example,
    rows_of,
)
from mezo.runtimes.sides import Sides
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, available_backends

SIGNS = ("plus", "minus")
WATCHED = 1 << 20  # elements of a whole model that a watched step compares with the reference


class HFRuntime:
    """transformers + PEFT on one device; implements all that `mezo.runtimes.base` has but `Follower`.

    The float32 master and the two perturbed copies lie beside the model; a copy is put to use by pointing the
    trained parameters at it, so nothing is copied and nothing is ever restored by arithmetic. Where the base itself
    is trained nothing else is left of it: 12 bytes a parameter in float32, 8 in 16 bits.

    With --directions the copies of as many perturbations as fit --copies-bytes lie there, and one forward pass runs
    all rows at both signs of all of them (`rowwise.py`). Where the model cannot, a forward pass runs each.

    Args:
        model: which, and what is trained of it.
        machine: where it runs, with options of this runtime.
        work: what the run asks for.
        pad: token id to pad with.
        checkpoint: of the model, if its configuration has been read.
    Raises:
        UserError: no such device or backend, or the model cannot be loaded or trained so.
    """

    def __init__(
        self, model: Model, machine: Machine, work: Workload, pad: int = 0, checkpoint: Checkpoint | None = None
    ):
        self.device = _device(machine.device)
        self.dtype = _dtype(model.dtype, self.device)
        self.backend = None if machine.backend == "auto" else machine.backend
        _check_backend(self.backend, self.device)
        checkpoint = checkpoint or Checkpoint.of(model.base)
        self.parts, self.spec = load_parts(model, self.device, self.dtype, work.classes, checkpoint)
        self.tokens, self.eval_tokens = TokenCount(), TokenCount()
        self.pad, self.work, self.source = pad, work, model.base
        self.options: HF = machine.runtime
        self.params = list(self.parts.params.values())
        self.linear = self._with_product(product_of(model, machine, checkpoint))
        self.whole = self.spec.peft is None
        start = [p.data.float() if self.whole else torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        self.master = ParamLayout(dict(zip(self.spec.shapes, start, strict=True)))
        self.pairs, self.why_not_rowwise = self._pairs_held(), why_not(self.parts)
        self.rowwise: RowWise | None = None
        pairs = self._allocate(by_row=work.directions > 1 and self.why_not_rowwise is None)
        self.plus, self.minus = pairs[0]
        named = ((f"{sign}{k}", copy) for k, pair in enumerate(pairs) for sign, copy in zip(SIGNS, pair, strict=True))
        self.copies, self.held = dict(named), self.pairs
        rule = work.rule
        rule.check_patterns(self.master.names)
        watched = WATCHED if self.whole else None
        self.perturbed = PerturbedTheta(self.master, pairs, self.backend, rule, watched)
        self.sides = Sides(rule.rule.one_sided)
        self.seconds = dict.fromkeys(("kernels", "forward"), 0.0)
        self.seconds_proving = 0.0
        self.examples: dict[str, Sequence[Example]] = {}
        self.trunk: Trunk | None = None
        self.reading: Reading | None = None
        self.writing = Writing.of(checkpoint) if work.max_new_tokens else None
        self.vocabulary = "lm_cross_entropy" in work.objectives
        self.decoder = decoder_of(checkpoint) if self.parts.encoder_decoder else None
        if self.writing and not (self.parts.causal or self.decoder):
            raise UserError(f"--model {model.base} fills masks and generates no text: use another model")

    def _with_product(self, product: Product) -> str:
        """Have the frozen weights, if there are any, multiplied so; return "torch" or "packed"."""
        if self.spec.peft is None:
            return "torch"
        packed = product.name == "packed"
        nbytes = pack(self.parts.body, set(map(id, self.params))) if packed else 0
        if packed and not nbytes:
            product = Product("torch", "products are torch's own: this model has linear layers of its own making")
        add_adapters_in_place(self.parts.model)
        if self.device.type == "cpu":
            tell(product, nbytes)
        return product.name

    def _allocate(self, by_row: bool) -> list[tuple[ParamLayout, ParamLayout]]:
        """Room for the perturbed copies, (plus, minus) of each pair; `by_row`: where `rowwise` finds them."""
        zeros = lambda p, *copies: torch.zeros(*copies, *p.shape, dtype=self.dtype, device=self.device)  # noqa: E731
        if not by_row:
            copies = [self.master.like([zeros(p) for p in self.params]) for _ in range(2 * self.pairs)]
        else:
            stacks = [zeros(p, 2 * self.pairs) for p in self.params]
            self.rowwise = RowWise(self.parts, stacks)
            copies = [self.master.like(list(copy)) for copy in zip(*stacks, strict=True)]
        return list(zip(copies[: self.pairs], copies[self.pairs :], strict=True))

    def _pairs_held(self) -> int:
        """Perturbations whose copies are held at once: one where they are scored one after the other anyway."""
        if self.work.directions == 1 or why_not(self.parts):
            return 1
        fit = self.options.copies_bytes // (2 * self.dtype.itemsize * self.master.n_elements)
        return max(1, min(fit, self.work.perturbations))

    def prepare(self, splits: dict[str, Sequence[Example]]) -> None:
        """See `Runtime.prepare`. Raises UserError if a trunk cache that was asked for is not exact on this model."""
        self.examples = splits
        make = self.decoder.rows_of if self.decoder else rows_of
        self.rows = {split: rows_by_example(examples, make) for split, examples in splits.items()}
        self.first_row = {split: first_rows(rows) for split, rows in self.rows.items()}
        self._check_lengths()
        # of a large split all examples have the options of the first, or each has some of several tokens
        options = [example.options for examples in splits.values() for example in looked_at(examples)]
        large = [examples for examples in splits.values() if isinstance(examples, LargeExamples)]
        self.vocabulary |= any(not examples.alike for examples in large)
        # scores up to a constant compare options of one token each; longer ones, or one alone, need log-probabilities
        self.vocabulary |= any(len(each) == 1 or any(len(option) > 1 for option in each) for each in options)
        asked, needless = self.options.trunk_cache, self.parts.first == 0 or not self.work.scores
        if asked in ("cpu", "device") and needless:
            why = "layer 0 is adapted, nothing lies below it; use --layers-to-transform or auto"
            if not self.work.scores:
                names = ", ".join(self.work.objectives)
                why = f"--objective {names} generates text, which takes nothing from it; use auto"
            raise UserError(f"--trunk-cache: {why}")
        self._prove(with_trunk=asked != "off" and not needless)
        if self.trunk:
            self._fill_trunk()

    def _check_lengths(self) -> None:
        limit, prefix = self.parts.position_limit, self.parts.prefix_tokens
        seen = {split: looked_at(examples) for split, examples in self.examples.items()}
        refuse_too_long(self.work, seen, self._longest(), limit, prefix)

    def _longest(self) -> int:
        """Tokens of the longest row; of a large split, whose rows are not all known, the most that are allowed."""
        longest = max(len(row.ids) for nested in self.rows.values() for i in measured(nested) for row in nested[i])
        large = [examples.max_length for examples in self.examples.values() if isinstance(examples, LargeExamples)]
        return max([longest, *large])

    def _fill_trunk(self) -> None:
        """Compute the trunk of all rows but those of a training set that the steps to come do not see whole."""
        self.trunk.clear()
        short = self._seen_in_part(self.work.done) | {
            s for s, nested in self.rows.items() if isinstance(nested, LargeRows)
        }
        for split in short:
            say(f"the trunk cache is not filled with {split} ahead: the steps to come do not draw all of its examples")
        for split in [split for split in self.rows if split not in short]:
            count = self.tokens if split == "train" else self.eval_tokens
            count.computed += self._trunk_share(self.trunk.fill(split))

    def _seen_in_part(self, done: int = 0) -> set[str]:
        """Splits of which the steps after so many see some examples alone."""
        drawn = (self.work.steps - done) * self.work.batch_size
        return {split for split in self.rows if split == "train" and drawn < len(self.examples[split])}

    @property
    def seconds_filling(self) -> float:
        """Time spent filling the trunk cache so far."""
        return self.trunk.seconds if self.trunk else 0.0

    @property
    def tokens_filled(self) -> int:
        """Tokens that the trunk cache was filled with so far."""
        return self.trunk.tokens if self.trunk else 0

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """See `Runtime.load`."""
        for name, tensor in zip(self.master.names, self.master.tensors, strict=True):
            tensor.copy_(theta[name])
        for name, p in self.parts.attached.frozen.items():
            if name in theta:
                p.data.copy_(theta[name])
        self.perturbed.forget()
        self.sides.loaded()

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """See `InitialTheta.initial_theta`."""
        return self.parts.attached.initial(run_seed)

    def theta(self) -> dict[str, torch.Tensor]:
        """See `Runtime.theta`."""
        tensors = (t.detach().to("cpu", copy=True) for t in self.master.tensors)
        return dict(zip(self.master.names, tensors, strict=True))

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """See `Runtime.update`: one fused pass."""
        with self._timed("kernels"):
            self.perturbed.update(updates, then, watch=watch)
        self.held = len(then or ())
        self.sides.written(theta_changed=bool(updates))

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """See `Runtime.perturb`."""
        self.update([], step, watch=watch)

    def equalise(self) -> None:
        """See `Runtime.equalise`."""
        self.perturbed.show([self.plus, self.minus])
        self.sides.equalised()
        self.held = 1

    def verify(self) -> str | None:
        """See `Runtime.verify`: what is compared is what the model's parameters point at."""
        used = [self.copies[f"{sign}{k}"] for k in range(self.held) for sign in SIGNS]
        return self.perturbed.verify([self._use(copy) for copy in used])

    @torch.no_grad()
    def score_pairs(
        self, split: str, indices: Sequence[int], shares: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `Runtime.score_pairs`. Both signs run on the same gathered batch."""

        def read(names: list[str]) -> list[torch.Tensor]:
            return self._with_each(names, self._forward(split, indices, self.tokens, signs=len(names)))

        with self._timed("forward"):
            if shares is None:
                return self.sides.pairs(self.held, ("scores", split, *indices), read)
            batches = [[indices[i] for i in share] for share in shares]
            if self.rowwise:
                return self._pairs_at_once(batches, lambda all_, copies: self._scores(split, all_, copies))
            return [
                self._pair(k, batch, lambda b: self._forward(split, b, self.tokens, signs=1)())
                for k, batch in enumerate(batches)
            ]

    def _pairs_at_once(self, batches: Sequence[Sequence[int]], run: Callable) -> list[tuple]:
        """What one pass gives for batch k at plus k and at minus k, for all k.

        Args:
            batches: numbers of examples, one batch a perturbation.
            run: from numbers of examples and the copy of each, results in order.
        """
        flat = [i for batch in batches for i in batch]
        owners = [k for k, batch in enumerate(batches) for _ in batch]
        results = run(flat * 2, [*owners, *(self.pairs + k for k in owners)])
        ends = list(itertools.accumulate(map(len, batches)))
        spans = [slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
        plus, minus = results[: len(flat)], results[len(flat) :]
        return [(plus[span], minus[span]) for span in spans]

    def _pair(self, k: int, batch: Sequence[int], run: Callable) -> tuple:
        """What `run` returns of a batch, which may be empty, at plus k and at minus k."""
        if not batch:
            return [], []
        return tuple(self._with_each([f"{sign}{k}" for sign in SIGNS], lambda: run(batch)))

    def _scores(self, split: str, indices: Sequence[int], copies: Sequence[int]) -> torch.Tensor:
        """Option scores of examples, each at a copy of its own."""
        of_rows = [copy for i, copy in zip(indices, copies, strict=True) for _ in self.rows[split][i]]
        return self._forward(split, indices, self.tokens, signs=1, copies=of_rows)()

    @torch.no_grad()
    def score(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """See `Runtime.score`. A 16-bit model sees theta rounded once."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        return self._forward(split, indices, self.eval_tokens, signs=1)()

    def generate(self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `Runtime.generate`. The trunk cache has no part in it: a text is new at every theta."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        return self._write(split, indices, max_new_tokens, stop, self.eval_tokens)

    def generate_pairs(
        self,
        split: str,
        indices: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str],
        shares: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[list[str], list[str]]]:
        """See `Runtime.generate_pairs`."""
        write = lambda batch: self._write(split, batch, max_new_tokens, stop, self.tokens)  # noqa: E731
        read = lambda names: self._with_each(names, lambda: write(indices))  # noqa: E731
        with self._timed("forward"):
            if shares is None:
                return self.sides.pairs(self.held, ("texts", split, *indices), read)
            batches = [[indices[i] for i in share] for share in shares]
            if self.rowwise is None or self.parts.prefix:
                return [self._pair(k, batch, write) for k, batch in enumerate(batches)]

            def run(examples: Sequence[int], copies: Sequence[int]) -> list[str]:
                with self.rowwise.using(copies):
                    return write(examples)

            return self._pairs_at_once(batches, run)

    def _with_each(self, names: Sequence[str], run: Callable) -> list:
        """What `run` returns with each of these copies in use, in order."""
        results = []
        for name in names:
            self._use(self.copies[name])
            results.append(run())
        return results

    def _write(
        self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str], count: TokenCount
    ) -> list[str]:
        """Texts with the weights in use; a token of an answer is run to find the next, so the last one never is."""
        prompts = [self.examples[split][i].prompt for i in indices]
        ended = lambda ids: self.writing.ended(ids, stop)  # noqa: E731
        parts = self.parts
        if self.decoder:
            answers = greedy_by_decoder(parts.base, self.decoder, prompts, max_new_tokens, ended, self.pad)
        else:
            answers = greedy(parts.body, parts.logits, prompts, max_new_tokens, ended, self.pad, parts.prefix)
        tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True))
        count.scored, count.computed = count.scored + tokens, count.computed + tokens
        return [self.writing.text(answer, stop) for answer in answers]

    def gradient(
        self, split: str, indices: Sequence[int], loss: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """See `Differentiable.gradient`. A 16-bit model is differentiated where theta rounds to."""
        with torch.no_grad():
            forward = self._forward(split, indices, self.eval_tokens, signs=1)
        self._point([t.to(self.dtype) for t in self.master.tensors])
        for p in self.params:
            p.requires_grad_(True)
        try:
            grads = torch.autograd.grad(loss(forward()), self.params, materialize_grads=True)
        finally:
            self.parts.model.requires_grad_(False)
        return {name: g.float().cpu() for name, g in zip(self.master.names, grads, strict=True)}

    def save_model(self, directory: Path) -> None:
        """See `Savable.save_model`."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        save_model(self.parts.model, self.source, directory)

    def describe(self) -> str:
        """See `Runtime.describe`."""
        n, layers = self.master.n_elements, len(self.parts.layers)
        cache = "no trunk cache"
        if self.trunk:
            kind = "scored positions only" if self.trunk.keep_kv else f"layers {self.parts.first} to {layers - 1}"
            cache = f"trunk cache on {self.trunk.storage} ({self.trunk.nbytes / 2**20:.0f} MiB; runs {kind})"
            if self.trunk.full:
                cache += "; it is full and computes rows again: raise --trunk-cache-bytes"
        return (
            f"{n:,} {self.parts.attached.title}, {self.dtype} base on {self.device}, {cache}{self._describe_passes()}"
        )

    def _describe_passes(self) -> str:
        """How the perturbations of a step share forward passes, where the batch is divided among directions."""
        if self.work.directions == 1:
            return ""
        if self.rowwise is None:
            return f"; {self.work.directions} directions, a forward pass each: {self.why_not_rowwise}"
        passes = -(-self.work.perturbations // self.pairs)
        held = f"{self.pairs} of {self.work.perturbations} perturbations" if passes > 1 else "all perturbations"
        return f"; {self.work.directions} directions, a forward pass holds {held} at both signs"

    def close(self) -> None:
        """See `Runtime.close`."""

    @contextmanager
    def _timed(self, part: str):
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def _use(self, copy: ParamLayout) -> list[torch.Tensor]:
        self._point(copy.tensors)
        return [p.data for p in self.params]

    def _point(self, tensors: Sequence[torch.Tensor]) -> None:
        for p, tensor in zip(self.params, tensors, strict=True):
            p.data = tensor

    def _forward(
        self, split: str, indices: Sequence[int], count: TokenCount, signs: int, copies: Sequence[int] | None = None
    ) -> Callable[[], torch.Tensor]:
        """Gather a batch and count its tokens; each call of the result scores it.

        Args:
            split, indices: the examples.
            count: of tokens.
            signs: how often the result will be called.
            copies: of each row, which copy runs it; None runs all with the weights in use at the call.
        """
        if isinstance(self.examples[split], LargeExamples):
            self.examples[split].fetch(indices)
        rows = [row for i in indices for row in self.rows[split][i]]
        batch = RowBatch.of(rows, self.pad, self.device)
        examples = [self.examples[split][i] for i in indices]
        tokens = sum(row.tokens for row in rows)
        count.scored += signs * tokens
        outputs, filled = self._outputs(split, indices, batch, copies)
        if self.trunk is None:
            count.computed += signs * tokens
        else:
            n_layers, first = len(self.parts.layers), self.parts.first
            run = int(batch.valid.sum()) if self.trunk.keep_kv else tokens
            count.computed += signs * run * (n_layers - first) / n_layers + self._trunk_share(filled)

        def scores() -> torch.Tensor:
            log_probs = self._log_probs(outputs(), batch.targets, self.vocabulary, copies)
            return option_scores(examples, log_probs, batch.valid.cpu())

        return scores

    def _outputs(
        self, split: str, indices: Sequence[int], batch: RowBatch, copies: Sequence[int] | None = None
    ) -> tuple[Callable[[], torch.Tensor], int]:
        """A function that gives `Reading.outputs` at the scored positions, and the tokens whose trunk was run.

        Args:
            split, indices: the examples.
            batch: their rows.
            copies: see `_forward`.
        """
        starts = self.first_row[split]
        numbers = [n for i in indices for n in range(starts[i], starts[i] + len(self.rows[split][i]))]
        if self.device.type != "cpu" or (self.trunk and self.trunk.keep_kv):
            return self._run_of(split, numbers, batch, copies)
        groups = by_length(batch.lengths.tolist(), CALL)
        runs, filled = zip(
            *(
                self._run_of(
                    split, [numbers[n] for n in group], batch.part(group), copies and [copies[n] for n in group]
                )
                for group in groups
            ),
            strict=True,
        )
        back = torch.tensor([n for group in groups for n in group]).argsort()
        return lambda: torch.cat([run() for run in runs])[back], sum(filled)

    def _run_of(
        self, split: str, numbers: Sequence[int], batch: RowBatch, copies: Sequence[int] | None
    ) -> tuple[Callable[[], torch.Tensor], int]:
        """See `_outputs`; of rows that are run together."""
        if self.trunk is None:
            run, filled = functools.partial(self._full, batch), 0
        else:
            trunk, filled = self.trunk.hidden(split, numbers, batch)
            run = lambda prefix=None: trunk()  # noqa: E731  a prefix has no trunk below it
        if copies is None:
            return run, filled

        def by_row() -> torch.Tensor:
            with self.rowwise.using(copies) as prefix:
                return run(prefix)

        return by_row, filled

    def _trunk_share(self, tokens: int) -> float:
        """Work of filling the cache, in tokens through the whole model; keys and values count as one layer."""
        return tokens * (self.parts.first + self.trunk.keep_kv) / len(self.parts.layers)

    def _full(self, batch: RowBatch, prefixes: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs of rows that are run through every layer."""
        by_parts = isinstance(self.reading, ByParts)
        # padding on the right is invisible to a causal layer; the model itself is told of it all the same
        mask, prefix = None if self.parts.causal and by_parts else batch.mask, self.parts.prefix
        others = {"attention_mask": mask, **no_cache(self.parts.causal or self.decoder is not None)}
        if self.decoder:
            others["decoder_input_ids"] = batch.decoder
        inputs = prefix.inputs(len(batch.ids), mask, prefixes) if prefix else others
        return self.reading.outputs(batch.ids, batch.positions, **inputs)

    def _log_probs(
        self, outputs: torch.Tensor, targets: torch.Tensor, vocabulary: bool, copies: Sequence[int] | None = None
    ) -> torch.Tensor:
        """log p of the targets.

        Args:
            outputs: (rows, scored, ...), see `Reading.outputs`.
            targets: (rows, scored, candidates) token ids.
            vocabulary: normalise over the vocabulary; else they are right up to a constant of each position.
            copies: see `_forward`.
        Returns:
            (rows, scored, candidates) float64, on the CPU.
        """
        tokens, inverse = targets.unique(return_inverse=True)
        by_row = copies is not None and self.rowwise.head_trained
        logits = None if vocabulary or by_row else self.reading.some_logits(outputs, tokens)
        if logits is not None:
            return logits.gather(-1, inverse).double().cpu()
        with self.rowwise.using(copies) if by_row else nullcontext():
            logits = self.reading.logits(outputs)
        log_z = logits.double().logsumexp(-1, keepdim=True) if vocabulary else 0.0
        return (logits.gather(-1, targets).double() - log_z).cpu()

    def _trunk(self, reading: Reading, keep_kv: bool) -> Trunk:
        parts, choice = self.parts, self.options.trunk_cache
        on_device = choice == "device" or (choice == "auto" and self.device.type != "cpu")
        trunk = Trunk(
            reading,
            parts.layers,
            parts.first,
            keep_kv=keep_kv,
            causal=parts.causal,
            pad=self.pad,
            device=self.device,
            storage=self.device if on_device else torch.device("cpu"),
            limit=self.options.trunk_cache_bytes,
        )
        later = self._seen_in_part()
        for split, nested in self.rows.items():
            if isinstance(nested, LargeRows):
                trunk.register_one_by_one(split, nested.row, kept=split not in later)
                continue
            rows = [row for example in nested for row in example]
            trunk.register(split, rows, kept=split not in later)
        return trunk

    def _ways(self, with_trunk: bool) -> list[tuple[Trunk | None, Reading]]:
        """Ways to scores, from the one that computes least to the model's own forward pass."""
        parts, asked = self.parts, self.options.trunk_cache
        readings = [ByParts(parts)] if parts.head else []
        if not parts.linear_head:
            readings.append(ByModel(parts))
        trunks = []
        if with_trunk:
            in_window = not (parts.window and parts.window < self._longest())
            by_kv = parts.kv_depends is None and in_window and attention_of(parts.layers[parts.first])
            trunks = [(self._trunk(r, keep), r) for keep in ([True, False] if by_kv else [False]) for r in readings]
        return trunks if asked in ("cpu", "device") else [*trunks, *((None, reading) for reading in readings)]

    def _prove(self, with_trunk: bool) -> None:
        """Take the first way whose scores are those of the model itself, and say what the others would have saved.

        Raises:
            UserError: there is none.
        """
        say("proving that the model is scored as it scores itself, on a few examples")
        began, ways = time.perf_counter(), self._ways(with_trunk)
        proof, refusals = StartProof(self.rows, self.pad, self.device, self.dtype), []
        for self.trunk, self.reading in ways:
            plain = self.trunk is None and len(refusals) == len(ways) - 1
            refusal = self._why_wrong(proof, plain)
            if refusal is None:
                break
            refusals.append(refusal)
        else:
            if self.trunk:
                raise UserError(f"--trunk-cache: {refusals[0]}; use --trunk-cache off")
            raise UserError(f"--model: {refusals[-1]}; rows change each other's scores in it, unsupported")
        if refusals:
            say(f"{refusals[0]}: {self._given_up(*ways[0])}")
        if self.trunk:
            self.trunk.clear()
        if self.rowwise:
            self._prove_rowwise(proof)
        self.seconds_proving = time.perf_counter() - began

    def _given_up(self, trunk: Trunk | None, reading: Reading) -> str:
        """What it costs to score as it is done now and not so."""
        costs = []
        if trunk and self.trunk is None:
            costs.append(f"no trunk cache, all {len(self.parts.layers)} layers run for each score")
        elif trunk and trunk.keep_kv and not self.trunk.keep_kv:
            costs.append("the trunk cache keeps whole rows, the last layer runs for all tokens")
        if isinstance(reading, ByParts) and isinstance(self.reading, ByModel):
            costs.append("logits by the model's own forward pass, of all tokens of the vocabulary")
        return "; ".join(costs)

    @torch.no_grad()
    def _why_wrong(self, proof: StartProof, plain: bool) -> str | None:
        """Why the way at hand does not give the model's own scores, None if it does.

        Args:
            proof: rows to score.
            plain: it is the model's own forward pass: if that fails, nothing is left to try.
        """
        try:
            self._use_noise(seed=0)
            outputs, _ = self._outputs(proof.split, proof.indices, proof.batch)
            self._use_noise(seed=1)  # what is cached by now is of another theta, as in training
            log_probs = self._log_probs(outputs(), proof.batch.targets, vocabulary=True)
        except Exception as error:
            if plain:
                raise
            return _why_not_run(error)
        return proof.why_wrong(self.parts.model, log_probs, plain)

    @torch.no_grad()
    def prove_adapter(self, directory: str) -> None:
        """See `ReadsAdapters.prove_adapter`."""
        self._point([t.to(self.dtype) for t in self.master.tensors])
        proof = StartProof(self.rows, self.pad, self.device, self.dtype)
        log_probs = reference_log_probs(self.parts.model, proof.batch)
        with as_peft_loads(self.parts.model, directory):
            why = proof.why_wrong(self.parts.model, log_probs)
        if why:
            raise UserError(f"adapter {directory}: it is another function where PEFT loads it: {why}")

    def _prove_rowwise(self, proof: StartProof) -> None:
        """Give up passes of rows with copies of their own, in favour of one for each copy, if scores change."""
        first, last = 0, 2 * self.pairs - 1
        self._use_noise(seed=2, copy=f"minus{self.pairs - 1}")
        copies = [copy for copy in (first, last) for _ in proof.rows]
        rows = RowBatch.of(proof.rows * 2, self.pad, self.device)
        try:
            outputs, _ = self._outputs(proof.split, proof.indices * 2, rows, copies)
            log_probs = self._log_probs(outputs(), rows.targets, vocabulary=True, copies=copies)
            used = (self.plus, self.copies[f"minus{self.pairs - 1}"])
            refusals = [
                self._use(copy) and proof.why_wrong(self.parts.model, scores)
                for copy, scores in zip(used, log_probs.chunk(2), strict=True)
            ]
        except RowsLost as error:
            refusals = [str(error)]
        except Exception as error:
            refusals = [_why_not_run(error)]
        if any(refusals):
            self.rowwise, self.why_not_rowwise = None, next(filter(None, refusals))

    def _use_noise(self, seed: int, copy: str = "plus0") -> None:
        """Write a theta that changes scores to a copy, which no step has written yet, and use it."""
        theta = dict(zip(self.master.names, self.master.tensors, strict=True))
        for tensor, noise in zip(self.copies[copy].tensors, self.parts.attached.noise(theta, seed), strict=True):
            tensor.copy_(noise)
        self._use(self.copies[copy])


def _why_not_run(error: Exception) -> str:
    """What a model that does not run in parts says, in a line; what has no memory is raised again."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    return f"this model does not run in parts ({type(error).__name__}: {' '.join(str(error).split()):.80})"


def product_of(model: Model, machine: Machine, checkpoint: Checkpoint) -> Product:
    """What multiplies by the frozen weights of a model here, as --linear says or a trial decides."""
    device = _device(machine.device)
    return choose(machine.runtime.linear, width_of(checkpoint.config), _dtype(model.dtype, device), device)


def packs(model: Model, machine: Machine) -> bool:
    """Whether the frozen weights of a model can be packed here."""
    device = _device(machine.device)
    return why_not_packed(_dtype(model.dtype, device), device) is None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu")
    return device


def _check_backend(backend: str | None, device: torch.device) -> None:
    available = available_backends(device)
    if backend is not None and backend not in available:
        raise UserError(f"--backend {backend} does not run on {device}; available there: {', '.join(available)}")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)
