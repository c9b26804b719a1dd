"""Rows: the token sequences a model sees for an example, and where in them its options are read."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from mezo.data.example import Example
from mezo.data.large import LargeExamples


@dataclass(frozen=True)
class Row:
    """One sequence.

    Args:
        ids: token ids.
        positions: where the scored tokens are predicted.
        targets: for each position, the candidate tokens scored there.
        decoder: of an encoder-decoder, what the decoder is given; `positions` are in it.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    decoder: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the model runs."""
        return len(self.ids) + len(self.decoder)


@dataclass(frozen=True)
class Decoder:
    """What an encoder-decoder is given around a prompt and its answer.

    Args:
        end: special tokens after the prompt, which the encoder reads.
        start: tokens that the decoder begins with.
    """

    end: tuple[int, ...]
    start: tuple[int, ...]

    def rows_of(self, example: Example) -> list[Row]:
        """As `rows_of`: the encoder reads the prompt, the decoder is scored on the options.

        >>> Decoder(end=(1,), start=(0,)).rows_of(Example((3, 4), ((5, 6), (7,)), label=0))[0]
        Row(ids=(3, 4, 1), positions=(0, 1), targets=((5,), (6,)), decoder=(0, 5))
        """
        ids, first, options = example.prompt + self.end, len(self.start) - 1, example.options or ((0,),)
        if all(len(option) == 1 for option in options):
            return [Row(ids, (first,), (tuple(option[0] for option in options),), self.start)]
        return [
            Row(
                ids,
                tuple(range(first, first + len(option))),
                tuple((token,) for token in option),
                self.start + option[:-1],
            )
            for option in options
        ]


def rows_of(example: Example) -> list[Row]:
    """One row where every option is a single token (they share the prompt), else one row an option.

    An example without options is never scored; what its row asks for, token 0, serves the proof at the start. A pooled
    one is read at every position: the mean of a linear head's outputs is its output on the mean.

    >>> rows_of(Example((3, 4), ((0,), (1,)), label=0, pooled=True))[0].positions
    (0, 1)
    """
    options = example.options or ((0,),)
    if example.pooled:
        n, outputs = len(example.prompt), tuple(output for (output,) in options)
        return [Row(example.prompt, tuple(range(n)), (outputs,) * n)]
    if all(len(option) == 1 for option in options):
        position = len(example.prompt) - 1 if example.mask is None else example.mask
        return [Row(example.prompt, (position,), (tuple(option[0] for option in options),))]
    start = len(example.prompt) - 1
    return [
        Row(
            example.prompt + option[:-1],
            tuple(range(start, start + len(option))),
            tuple((token,) for token in option),
        )
        for option in options
    ]


def row_of_class(example: Example, last: bool, pad: int) -> list[Row]:
    """The one row of an example that a classification head reads: at its first token, or its last that is no padding.

    Args:
        example: pooled.
        last: as decoders do; encoders read the first.
        pad: token id of padding.

    >>> row_of_class(Example((3, 4, 0), ((0,), (1,)), label=0, pooled=True), last=True, pad=0)
    [Row(ids=(3, 4, 0), positions=(1,), targets=((0, 1),), decoder=())]
    """
    ids = example.prompt
    at = max((i for i, token in enumerate(ids) if token != pad), default=0) if last else 0
    return [Row(ids, (at,), (tuple(output for (output,) in example.options),))]


class LargeRows(Sequence[list[Row]]):
    """Rows of each example of a large split, made when they are asked for.

    They have numbers: those of example i begin at i times the most rows of an example.
    """

    def __init__(self, examples: LargeExamples, make: Callable[[Example], list[Row]] = rows_of):
        self.make = make
        self.examples, self.most = examples, len(examples[0].options)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> list[Row]:
        return self.make(self.examples[i])

    def row(self, number: int) -> Row:
        """A row by its number."""
        return self[number // self.most][number % self.most]


def rows_by_example(examples: Sequence[Example], make: Callable[[Example], list[Row]] = rows_of) -> Sequence[list[Row]]:
    """The rows of each example of a split."""
    return LargeRows(examples, make) if isinstance(examples, LargeExamples) else list(map(make, examples))


def first_rows(rows: Sequence[list[Row]]) -> Sequence[int]:
    """The number of the first row of each example."""
    if isinstance(rows, LargeRows):
        return range(0, len(rows) * rows.most, rows.most)
    return [0, *itertools.accumulate(map(len, rows))][:-1]


def measured(rows: Sequence[list[Row]]) -> Sequence[int]:
    """Numbers of the examples of a split that are looked at to know it: all, or of a large one some."""
    return rows.examples.shown if isinstance(rows, LargeRows) else range(len(rows))


def most_rows(rows: Sequence[list[Row]]) -> int:
    """Of an example of a split."""
    return rows.most if isinstance(rows, LargeRows) else max(map(len, rows))


def most_tokens(rows: Sequence[list[Row]]) -> int:
    """Of all rows of an example of a split; of a large one what --max-length allows."""
    if isinstance(rows, LargeRows):
        return rows.most * rows.examples.max_length
    return max(sum(len(row.ids) for row in example) for example in rows)


@dataclass(frozen=True)
class RowBatch:
    """Rows as padded tensors on the model's device.

    Args:
        ids: (rows, length) int64, padded on the right.
        lengths: (rows,) int64.
        positions: (rows, scored) int64; short rows repeat their last position.
        valid: (rows, scored) bool, False for those repeats.
        targets: (rows, scored, candidates) int64.
        decoder: (rows, length of the longest) int64, see `Row.decoder`; None where there is none.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    targets: torch.Tensor
    decoder: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], pad: int, device: torch.device | str) -> "RowBatch":
        """Pad rows to their longest.

        Args:
            rows: in order.
            pad: token id to pad with.
            device: of the tensors.
        """
        length = max(len(row.ids) for row in rows)
        scored = max(len(row.positions) for row in rows)
        candidates = max(len(target) for row in rows for target in row.targets)
        repeat = [scored - len(row.positions) for row in rows]
        targets = [
            [[*t, *(t[-1:] * (candidates - len(t)))] for t in (*row.targets, *(row.targets[-1:] * n))]
            for row, n in zip(rows, repeat, strict=True)
        ]
        written = max(len(row.decoder) for row in rows)
        decoder = torch.tensor([[*row.decoder, *([pad] * (written - len(row.decoder)))] for row in rows])
        return cls(
            torch.tensor([[*row.ids, *([pad] * (length - len(row.ids)))] for row in rows]).to(device),
            torch.tensor([len(row.ids) for row in rows]).to(device),
            torch.tensor([[*r.positions, *(r.positions[-1:] * n)] for r, n in zip(rows, repeat, strict=True)]).to(
                device
            ),
            torch.tensor([[True] * len(r.positions) + [False] * n for r, n in zip(rows, repeat, strict=True)]).to(
                device
            ),
            torch.tensor(targets).to(device),
            decoder.to(device) if written else None,
        )

    def part(self, rows: Sequence[int]) -> "RowBatch":
        """Some of the rows, padded to the longest of them."""
        longest = int(self.lengths[rows].max())
        return RowBatch(
            self.ids[rows, :longest],
            self.lengths[rows],
            self.positions[rows],
            self.valid[rows],
            self.targets[rows],
            None if self.decoder is None else self.decoder[rows],
        )

    @property
    def mask(self) -> torch.Tensor:
        """(rows, length) int64: 1 where there is a token."""
        return (torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]).long()


def by_length(lengths: Sequence[int], call: int) -> list[list[int]]:
    """Rows in groups of like length, so that padding and calls together cost least.

    Args:
        lengths: tokens of each row.
        call: what running one more group costs, in tokens.
    Returns:
        Numbers of the rows of each group, shortest first; the optimum of sum(rows * longest + call) over groups.

    >>> by_length([3, 100, 4, 3, 90], call=10)
    [[0, 3, 2], [4, 1]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [n for n in range(1, len(order)) if lengths[order[n - 1]] < lengths[order[n]]] + [len(order)]
    best = {0: (0, 0)}  # rows so far -> (their cost, where their last group begins)
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((cost + (end - start) * longest + call, start) for start, (cost, _) in best.items())
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.insert(0, order[start:end])
        end = start
    return groups


def option_scores(examples: Sequence[Example], log_probs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of each option's tokens, float64 (examples, options), padded with -inf.

    Args:
        examples: those whose rows, in order, make up the batch.
        log_probs: (rows, scored, candidates) float64.
        valid: (rows, scored) bool.
    """
    width = max(len(example.options) for example in examples)
    scores = torch.full((len(examples), width), -torch.inf, dtype=torch.float64)
    means = (log_probs * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True)
    if len(means) == len(examples) and all(len(example.options[0]) == 1 for example in examples):
        n = torch.tensor([len(example.options) for example in examples])
        return torch.where(torch.arange(width) < n[:, None], means[:, :width], scores)
    row = 0
    for i, example in enumerate(examples):
        shared = all(len(option) == 1 for option in example.options)
        n, used = len(example.options), 1 if shared else len(example.options)
        scores[i, :n] = means[row, :n] if shared else means[row : row + n, 0]
        row += used
    return scores


def padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Score tensors one above the other, padded with -inf to one width.

    >>> padded([torch.zeros(1, 2), torch.zeros(1, 1)])
    tensor([[0., 0.],
            [0., -inf]])
    """
    width = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts])


def scores_of(
    examples: Sequence[Example], rows: Sequence[Row], tables: Sequence[list[dict[int, float]]]
) -> torch.Tensor:
    """`option_scores` from log-probabilities by token.

    Args:
        examples: those whose rows, in order, are scored.
        rows: of all of them.
        tables: of each row, for each scored position, log-probability by token id.

    >>> example = Example((3, 4), ((5,), (6,)), label=0)
    >>> scores_of([example], rows_of(example), [[{5: -1.0, 6: -2.0}]])
    tensor([[-1., -2.]], dtype=torch.float64)
    """
    scored = max(len(row.positions) for row in rows)
    candidates = max(len(target) for row in rows for target in row.targets)
    log_probs = torch.zeros(len(rows), scored, candidates, dtype=torch.float64)
    valid = torch.zeros(len(rows), scored, dtype=torch.bool)
    for i, (row, table) in enumerate(zip(rows, tables, strict=True)):
        valid[i, : len(row.positions)] = True
        for p, target in enumerate(row.targets):
            log_probs[i, p, : len(target)] = torch.tensor([table[p][t] for t in target], dtype=torch.float64)
    return option_scores(examples, log_probs, valid)


def scored(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states (rows, length, hidden_size) at positions (rows, scored)."""
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
