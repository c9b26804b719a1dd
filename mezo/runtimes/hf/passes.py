"""How rows become the tensors of one forward pass: padded to one length, or end to end, with nothing between them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from mezo.models.attention import within_rows
from mezo.runtimes.rows import RowBatch, by_length

CALL = 48
"""Tokens whose time a forward pass of none takes on a CPU, where the weights are read for each call."""

MOST = 2048
"""Tokens of rows that are run end to end in one pass; a longer row has one of its own."""


class Pass(Protocol):
    """Rows as a model is given them.

    Args:
        ids: (1 or rows, length) token ids.
        positions: of the scored tokens, as `Reading.outputs` takes them.
        inputs: other arguments of the forward pass.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    inputs: dict[str, torch.Tensor | None]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor, laid out as `ids` is, of tensors (length of the row, ...) by row."""

    def apart(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """A tensor that is laid out as `ids` is by row, (length of the row, ...) each: views."""

    def results(self, outputs: torch.Tensor) -> torch.Tensor:
        """(rows, scored, ...) of what `Reading.outputs` gives."""

    def running(self) -> AbstractContextManager:
        """Around the forward pass."""


class Layout(Protocol):
    """A way to run the rows of a batch."""

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows that are run together, by the length of each."""

    def of(self, batch: RowBatch) -> Pass:
        """Rows that are run together."""


@dataclass(frozen=True)
class PaddedRows:
    """Rows beside one another, padded on the right to the longest. On a CPU those of like length run together.

    Args:
        masked: the model is told where padding is; a causal layer does not see it anyway.
        by_length: run rows of like length together.
    """

    masked: bool
    by_length: bool

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `Layout.groups`."""
        return by_length(lengths, CALL) if self.by_length else [list(range(len(lengths)))]

    def of(self, batch: RowBatch) -> Pass:
        """See `Layout.of`."""
        return Padded(batch, self.masked)


@dataclass(frozen=True)
class RowsEndToEnd:
    """Rows one after the other in a single long one, short ones first; each token attends within its own row.

    Nothing is padded and no mask is made: attention, which alone tells rows apart, takes those of one length together.

    Args:
        first_position: number that the model gives the first position of a text.
        most: tokens of a pass; a longer row has one of its own.
    """

    first_position: int
    most: int

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `Layout.groups`."""
        return filled(lengths, self.most)

    def of(self, batch: RowBatch) -> Pass:
        """See `Layout.of`."""
        return EndToEnd(batch, self.first_position)


class Padded:
    """See `PaddedRows`.

    Args:
        batch: the rows.
        masked: see `PaddedRows`.
    """

    def __init__(self, batch: RowBatch, masked: bool):
        self.ids, self.positions = batch.ids, batch.positions
        self.inputs = {"attention_mask": batch.mask if masked else None}
        self.lengths = batch.lengths.tolist()

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Pass.joined`."""
        return pad_sequence(list(parts), batch_first=True)

    def apart(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """See `Pass.apart`."""
        return [row[:length] for row, length in zip(whole, self.lengths, strict=True)]

    def results(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Pass.results`."""
        return outputs

    def running(self) -> AbstractContextManager:
        """See `Pass.running`."""
        return nullcontext()


class EndToEnd:
    """See `RowsEndToEnd`.

    Args:
        batch: the rows.
        first_position: see `RowsEndToEnd`.
    """

    def __init__(self, batch: RowBatch, first_position: int):
        self.order = batch.lengths.argsort(stable=True)
        lengths = batch.lengths[self.order]
        ends = lengths.cumsum(0)
        starts = torch.empty_like(ends).scatter_(0, self.order, ends - lengths)  # in the order of the batch
        self.spans = [slice(start, start + n) for start, n in zip(starts.tolist(), batch.lengths.tolist(), strict=True)]
        length, rows = lengths.unique_consecutive(return_counts=True)
        self.groups = list(zip(rows.tolist(), length.tolist(), strict=True))
        within = torch.arange(int(ends[-1]), device=ends.device) - (ends - lengths).repeat_interleave(lengths)
        self.ids = batch.ids[self.order][batch.mask.bool()[self.order]][None]
        self.shape = batch.positions.shape
        self.positions = (starts[:, None] + batch.positions).view(1, -1)
        self.inputs = {"position_ids": within[None] + first_position}

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Pass.joined`."""
        return torch.cat([parts[row] for row in self.order.tolist()])[None]

    def apart(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """See `Pass.apart`."""
        return [whole[0, span] for span in self.spans]

    def results(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Pass.results`."""
        return outputs.view(*self.shape, *outputs.shape[2:])

    def running(self) -> AbstractContextManager:
        """See `Pass.running`."""
        return within_rows(self.groups)


def filled(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in groups of so many tokens at most, or of one row; short rows first.

    >>> filled([3, 9, 2, 5], most=10)
    [[2, 0, 3], [1]]
    """
    groups, tokens = [], most
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if tokens + lengths[row] > most:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += lengths[row]
    return groups
