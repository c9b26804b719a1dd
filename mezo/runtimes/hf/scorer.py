"""Rows in, scores out, with whatever weights the model's parameters point at: the forward passes of the hf runtime.

The way to a score is the one that computes least of those that the proof at the start finds right: parts of the model
above a cache of its trunk, its body and head, or the model's own forward pass.
"""

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from mezo.config import HF, Workload
from mezo.data.example import Example
from mezo.data.large import LargeExamples, looked_at
from mezo.errors import UserError
from mezo.models.parts import ModelParts
from mezo.models.quantization import is_quantised
from mezo.progress import say, waiting
from mezo.runtimes.base import TokenCount
from mezo.runtimes.generation import Decoder, refuse_too_long
from mezo.runtimes.hf.passes import MOST, Layout, PaddedRows, Pass, RowsEndToEnd
from mezo.runtimes.hf.proof import StartProof
from mezo.runtimes.hf.reading import ByClassifier, ByModel, ByParts, Reading
from mezo.runtimes.hf.rowwise import RowsLost, RowWise, why_not
from mezo.runtimes.hf.trunk import Trunk, attention_of, no_cache
from mezo.runtimes.rows import (
    LargeRows,
    RowBatch,
    first_rows,
    measured,
    option_scores,
    row_of_class,
    rows_by_example,
    rows_of,
)


class Use(Protocol):
    """Puts a copy of the weights, by its number, to use; given a seed, writes noise that changes scores there first."""

    def __call__(self, copy: int, seed: int | None = None) -> None: ...


@dataclass(frozen=True)
class Way:
    """A way to scores.

    Args:
        trunk: cache of what theta cannot change; None runs every layer.
        reading: how logits are read.
        layout: how rows are run.
    """

    trunk: Trunk | None
    reading: Reading
    layout: Layout


class Scorer:
    """What a model says of rows, by the cheapest forward pass that is proved right.

    Args:
        parts: the model.
        options: of the runtime: which trunk cache.
        work: what the run asks for.
        pad: token id to pad with.
        dtype: of the weights that are put to use.
        decoder: how rows are made for an encoder-decoder, None for any other model.
        rowwise: copies of what is trained, one of which each row of a pass may have; None where that is not possible.
    """

    def __init__(
        self,
        parts: ModelParts,
        options: HF,
        work: Workload,
        pad: int,
        dtype: torch.dtype,
        decoder: Decoder | None,
        rowwise: RowWise | None,
    ):
        self.parts, self.options, self.work, self.pad, self.dtype = parts, options, work, pad, dtype
        self.device = next(iter(parts.params.values())).device
        self.decoder, self.rowwise = decoder, rowwise
        self.vocabulary = "lm_cross_entropy" in work.objectives
        self.examples: dict[str, Sequence[Example]] = {}
        self.way: Way | None = None
        self.seconds_proving = 0.0
        self.why_not_rowwise = why_not(parts)

    @property
    def trunk(self) -> Trunk | None:
        """The trunk cache in use, if any."""
        return self.way and self.way.trunk

    @property
    def reading(self) -> Reading:
        """How logits are read, once that has been proved."""
        return self.way.reading

    def prepare(self, splits: dict[str, Sequence[Example]], use: Use) -> None:
        """Take the examples of a run, and choose and prove the way to their scores.

        Args:
            splits: examples by split.
            use: puts a copy of the weights to use.
        Raises:
            UserError: a row is too long, or a trunk cache that was asked for is not exact on this model.
        """
        self.examples = splits
        self._make = self.decoder.rows_of if self.decoder else rows_of
        if self.parts.scored_by == "classification":
            self._make = functools.partial(row_of_class, last=self.parts.causal, pad=self.pad)
        self.rows = {split: rows_by_example(examples, self._make) for split, examples in splits.items()}
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
        with waiting("proving that the model is scored as it scores itself, on a few examples"):
            self._prove(asked != "off" and not needless, use)

    def refuse_further(self, examples: Sequence[Example]) -> None:
        """See `Grows.refuse_further`: what was proved at the start must hold for these too."""
        longest = max(len(row.ids) for rows in rows_by_example(examples, self._make) for row in rows)
        refuse_too_long(self.work, {"train": examples}, longest, self.parts.position_limit, self.parts.prefix_tokens)
        if self.trunk and self.parts.window and longest > self.parts.window:
            raise UserError(f"an example has {longest} tokens, the last layer attends to {self.parts.window}")
        several = any(len(e.options) == 1 or any(len(option) > 1 for option in e.options) for e in examples)
        if several and not self.vocabulary:
            raise UserError("options: those of the run have one token each, and there are several: give such")

    def grow(self, split: str, examples: Sequence[Example]) -> None:
        """See `Grows.grow`."""
        self.refuse_further(examples)
        rows = [self._make(example) for example in examples]
        self.examples = {**self.examples, split: [*self.examples[split], *examples]}
        self.rows = {**self.rows, split: [*self.rows[split], *rows]}
        self.first_row = {**self.first_row, split: first_rows(self.rows[split])}
        if self.trunk:
            self.trunk.extend(split, [row for each in rows for row in each])

    def _check_lengths(self) -> None:
        limit, prefix = self.parts.position_limit, self.parts.prefix_tokens
        seen = {split: looked_at(examples) for split, examples in self.examples.items()}
        refuse_too_long(self.work, seen, self._longest(), limit, prefix)

    def _longest(self) -> int:
        """Tokens of the longest row; of a large split, whose rows are not all known, the most that are allowed."""
        longest = max(len(row.ids) for nested in self.rows.values() for i in measured(nested) for row in nested[i])
        large = [examples.max_length for examples in self.examples.values() if isinstance(examples, LargeExamples)]
        return max([longest, *large])

    def fill(self) -> dict[str, float]:
        """Compute the trunk of all rows but those of a training set that the steps to come do not see whole.

        Returns:
            work by split, in tokens through the whole model; nothing where there is no trunk cache.
        """
        if self.trunk is None:
            return {}
        self.trunk.clear()
        short = self._seen_in_part(self.work.done) | {
            s for s, nested in self.rows.items() if isinstance(nested, LargeRows)
        }
        for split in short:
            say(f"the trunk cache is not filled with {split} ahead: the steps to come do not draw all of its examples")
        return {split: self._trunk_share(self.trunk.fill(split)) for split in self.rows if split not in short}

    def _seen_in_part(self, done: int = 0) -> set[str]:
        """Splits of which the steps after so many see some examples alone."""
        drawn = (self.work.steps - done) * self.work.batch_size
        return {split for split in self.rows if split == "train" and drawn < len(self.examples[split])}

    def forward(
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
        if self.trunk and self.trunk.keep_kv:
            return self._run_of(split, numbers, batch, copies)
        groups = self.way.layout.groups(batch.lengths.tolist())
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
        rows = self.way.layout.of(batch)
        if self.trunk is None:
            run, filled = functools.partial(self._full, batch, rows), 0
        else:
            trunk, filled = self.trunk.hidden(split, numbers, batch, rows)
            run = lambda prefix=None: trunk()  # noqa: E731  a prefix has no trunk below it
        if copies is None:
            return run, filled

        def by_row() -> torch.Tensor:
            with self.rowwise.using(copies, None if self.trunk and self.trunk.keep_kv else rows) as prefix:
                return run(prefix)

        return by_row, filled

    def _trunk_share(self, tokens: int) -> float:
        """Work of filling the cache, in tokens through the whole model; keys and values count as one layer."""
        return tokens * (self.parts.first + self.trunk.keep_kv) / len(self.parts.layers)

    def _full(self, batch: RowBatch, rows: Pass, prefixes: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs of rows that are run through every layer."""
        prefix, inputs = self.parts.prefix, rows.inputs | no_cache(self.parts.causal or self.decoder is not None)
        if self.decoder:
            inputs["decoder_input_ids"] = batch.decoder
        if prefix:
            inputs = prefix.inputs(len(batch.ids), inputs["attention_mask"], prefixes)
        with rows.running():
            return rows.results(self.reading.outputs(rows.ids, rows.positions, **inputs))

    def _padded(self, reading: Reading) -> PaddedRows:
        # padding on the right is invisible to a causal layer; the model itself is told of it all the same
        return PaddedRows(not (self.parts.causal and isinstance(reading, ByParts)), self.device.type == "cpu")

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

    def _trunk(self, reading: Reading, layout: Layout, keep_kv: bool) -> Trunk:
        parts, choice = self.parts, self.options.trunk_cache
        on_device = choice == "device" or (choice == "auto" and self.device.type != "cpu")
        trunk = Trunk(
            reading,
            parts.layers,
            parts.first,
            keep_kv=keep_kv,
            causal=parts.causal,
            layout=layout,
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

    def _ways(self, with_trunk: bool) -> list[Way]:
        """Ways to scores, from the one that computes least to the model's own forward pass."""
        parts, asked = self.parts, self.options.trunk_cache
        readings = [ByParts(parts)] if parts.head else []
        if parts.scored_by != "linear":
            readings.append(ByClassifier(parts) if parts.scored_by == "classification" else ByModel(parts))
        ways = [(reading, layout) for reading in readings for layout in self._layouts(reading)]
        trunks = []
        if with_trunk:
            in_window = not (parts.window and parts.window < self._longest())
            by_kv = parts.kv_depends is None and in_window and attention_of(parts.layers[parts.first])
            trunks = [
                Way(self._trunk(*way, keep), *way) for keep in ([True, False] if by_kv else [False]) for way in ways
            ]
        return trunks if asked in ("cpu", "device") else [*trunks, *(Way(None, *way) for way in ways)]

    def _layouts(self, reading: Reading) -> list[Layout]:
        """Ways to run rows, the one that pads nothing first; the model's own forward pass takes padded rows alone."""
        parts, layouts = self.parts, [self._padded(reading)]
        attends = isinstance(reading, ByParts) and parts.layers and attention_of(parts.layers[0])
        if self.device.type != "cpu" or not attends or parts.prefix or self.decoder:
            return layouts
        windows = (parts.family.window(parts.body.config, i) for i in range(len(parts.layers)))
        if any(window and window < self._longest() for window in windows):
            return layouts
        most = min(MOST, parts.position_limit or MOST)  # some models have tables of as many positions
        return [RowsEndToEnd(parts.family.first_position(parts.body.config), most), *layouts]

    def _prove(self, with_trunk: bool, use: Use) -> None:
        """Take the first way whose scores are those of the model itself, and say what the others would have saved.

        Args:
            with_trunk: try a trunk cache.
            use: see `prepare`.
        Raises:
            UserError: there is none.
        """
        began, ways = time.perf_counter(), self._ways(with_trunk)
        proof, refusals = self.proof(), []
        for self.way in ways:
            plain = self.trunk is None and len(refusals) == len(ways) - 1
            refusal = self._why_wrong(proof, plain, use)
            if refusal is None:
                break
            refusals.append(refusal)
        else:
            if self.trunk:
                raise UserError(f"--trunk-cache: {refusals[0]}; use --trunk-cache off")
            raise UserError(f"--model: {refusals[-1]}; rows change each other's scores in it, unsupported")
        if refusals:
            say(f"{refusals[0]}: {self._given_up(ways[0])}")
        if self.rowwise:
            self._prove_rowwise(proof, use)
        if self.trunk:
            self.trunk.clear()
        self.seconds_proving = time.perf_counter() - began

    def proof(self) -> StartProof:
        """The rows that are compared with the model itself."""
        return StartProof(self.rows, self.pad, self.device, self.dtype, is_quantised(self.parts.base))

    def _given_up(self, best: Way) -> str:
        """What it costs to score as it is done now and not by the best way."""
        costs, used = [], self.way
        if best.trunk and used.trunk is None:
            costs.append(f"no trunk cache, all {len(self.parts.layers)} layers run for each score")
        elif best.trunk and best.trunk.keep_kv and not used.trunk.keep_kv:
            costs.append("the trunk cache keeps whole rows, the last layer runs for all tokens")
        if isinstance(best.reading, ByParts) and isinstance(used.reading, ByModel):
            costs.append("logits by the model's own forward pass, of all tokens of the vocabulary")
        elif isinstance(best.layout, RowsEndToEnd) and isinstance(used.layout, PaddedRows):
            costs.append("rows are padded to the longest of those that run together")
        return "; ".join(costs)

    @torch.no_grad()
    def _why_wrong(self, proof: StartProof, plain: bool, use: Use) -> str | None:
        """Why the way at hand does not give the model's own scores, None if it does.

        Args:
            proof: rows to score.
            plain: it is the model's own forward pass: if that fails, nothing is left to try.
            use: see `prepare`.
        """
        try:
            use(0, 0)
            outputs, _ = self._outputs(proof.split, proof.indices, proof.batch)
            use(0, 1)  # what is cached by now is of another theta, as in training
            log_probs = self._log_probs(outputs(), proof.batch.targets, vocabulary=True)
        except Exception as error:
            if plain:
                raise
            return _why_not_run(error)
        return proof.why_wrong(self.parts.model, log_probs, plain, weights=0)

    def _prove_rowwise(self, proof: StartProof, use: Use) -> None:
        """Give up passes of rows with copies of their own, in favour of one for each copy, if scores change."""
        used = (0, self.rowwise.copies - 1)
        use(used[1], 2)
        copies = [copy for copy in used for _ in proof.rows]
        rows = RowBatch.of(proof.rows * 2, self.pad, self.device)
        try:
            outputs, _ = self._outputs(proof.split, proof.indices * 2, rows, copies)
            log_probs = self._log_probs(outputs(), rows.targets, vocabulary=True, copies=copies)
            refusals = []
            for copy, scores in zip(used, log_probs.chunk(2), strict=True):
                use(copy)
                refusals.append(proof.why_wrong(self.parts.model, scores, weights=copy))
        except RowsLost as error:
            refusals = [str(error)]
        except Exception as error:
            refusals = [_why_not_run(error)]
        if any(refusals):
            self.rowwise, self.why_not_rowwise = None, next(filter(None, refusals))


def _why_not_run(error: Exception) -> str:
    """What a model that does not run in parts says, in a line; what has no memory is raised again."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    return f"this model does not run in parts ({type(error).__name__}: {' '.join(str(error).split()):.80})"
