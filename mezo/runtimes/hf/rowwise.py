"""A forward pass in which every row is run by a copy of its own of what is trained.

The products of the frozen base are taken once over all rows, whatever copy they belong to; those of the adapters,
which are small, are batched products over rows. So all directions of a step, and both signs, are one forward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mezo.models.parts import ModelParts
from mezo.runtimes.hf.passes import EndToEnd, Pass


class RowsLost(Exception):
    """A module was called with something else than the rows of the batch: tokens of an expert, say."""


class RowWise:
    """Copies of what is trained, and the forward pass that gives each row one of them.

    Args:
        parts: the model; `why_not` is None.
        stacks: of each trained parameter, in order, its copies: (copies, *shape).
    """

    def __init__(self, parts: ModelParts, stacks: Sequence[torch.Tensor]):
        owners = _owners(parts)
        self.copies = len(stacks[0])
        self.prefix = stacks[0] if parts.prefix else None
        self.linear = (
            [] if parts.prefix else [(owners[id(p)], s) for p, s in zip(parts.params.values(), stacks, strict=True)]
        )
        trained = {id(module) for module, _ in self.linear}
        self.head_trained = any(id(module) in trained for module in (parts.head.modules() if parts.head else ()))

    @contextmanager
    def using(self, copies: Sequence[int], rows: Pass | None = None) -> Iterator[torch.Tensor | None]:
        """Meanwhile row i of a batch is run by copy copies[i]; yields the prefix of each row, if one is trained.

        Args:
            copies: numbers of copies.
            rows: how the rows are run; None: they are beside one another.
        Raises:
            RowsLost: in the forward pass, of a model that such a pass is not possible with.
        """
        end_to_end = isinstance(rows, EndToEnd)
        chosen = _chosen([copies[row] for row in rows.order.tolist()] if end_to_end else copies, views=not end_to_end)
        for module, stack in self.linear:
            weights = stack[chosen]
            module.forward = OfRowsEndToEnd(weights, rows.groups) if end_to_end else OfRows(weights, len(copies))
        try:
            yield None if self.prefix is None else self.prefix[list(copies)]
        finally:
            for module, _ in self.linear:
                del module.forward


def why_not(parts: ModelParts) -> str | None:
    """Why rows cannot have copies of their own, None if they can."""
    if parts.prefix:
        return None
    owners = _owners(parts)
    return next(
        (f"{name} is no adapter of a linear layer" for name, p in parts.params.items() if id(p) not in owners), None
    )


def _owners(parts: ModelParts) -> dict[int, nn.Module]:
    """By id of its weight, each linear layer of an adapter, or head beside one."""
    if parts.attached.peft is None:  # the base itself: a copy of it for every row is no small thing
        return {}
    linear = (module for module in parts.model.modules() if type(module) is nn.Linear and module.bias is None)
    return {id(module.weight): module for module in linear}


def _chosen(copies: Sequence[int], views: bool = True) -> slice | list[int]:
    """What takes the copies of rows out of a stack: a view where each copy has as many rows, one after the other.

    Args:
        copies: of the rows.
        views: allow that; else each row has one to itself.

    >>> _chosen([2, 2, 3, 3]), _chosen([0, 1, 0])
    (slice(2, 4, None), [0, 1, 0])
    """
    first, last = copies[0], copies[-1]
    each, rest = divmod(len(copies), last - first + 1) if views and last >= first else (0, 1)
    if not rest and list(copies) == [first + i // each for i in range(len(copies))]:
        return slice(first, last + 1)
    return list(copies)


class OfRows:
    """A linear layer whose weight is another for each row.

    Args:
        weights: (groups, outputs, inputs), of groups of as many rows.
        rows: of the batch.
    """

    def __init__(self, weights: torch.Tensor, rows: int):
        self.weights, self.rows = weights, rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs times the weights of their rows.

        Args:
            x: (rows, ..., inputs), or the tokens of all rows, one after the other, (rows * tokens, inputs).
        """
        return torch.bmm(self._grouped(x), self.weights.mT).view(*x.shape[:-1], -1)

    def added(self, out: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Add `scale` times that to outputs that are there, (rows, ..., outputs), and return these."""
        grouped, shape = self._grouped(x), (len(self.weights), -1, out.shape[-1])
        out.view(shape).baddbmm_(grouped, self.weights.mT, alpha=scale)
        return out

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) % self.rows:
            raise RowsLost(f"a layer was given {len(x)} rows where the batch has {self.rows}")
        return x.reshape(len(self.weights), -1, x.shape[-1])


class OfRowsEndToEnd:
    """A linear layer whose weight is another for each of the rows that lie end to end.

    Args:
        weights: (rows, outputs, inputs), in the order in which they lie.
        groups: (rows, length) of rows of one length, in that order.
    """

    def __init__(self, weights: torch.Tensor, groups: Sequence[tuple[int, int]]):
        self.parts, row, token = [], 0, 0
        for rows, length in groups:
            span = slice(token, token + rows * length)
            self.parts.append((span, (rows, length), weights[row : row + rows].mT))
            row, token = row + rows, span.stop
        self.tokens, self.outputs = token, weights.shape[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs, (1, tokens, inputs) or (tokens, inputs), times the weights of their rows."""
        out = x.new_empty(*x.shape[:-1], self.outputs)
        flat, into = self._flat(x), out.view(-1, self.outputs)
        for span, shape, weights in self.parts:
            torch.bmm(flat[span].view(*shape, -1), weights, out=into[span].view(*shape, -1))
        return out

    def added(self, out: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Add `scale` times that to outputs that are there, and return these."""
        flat, into = self._flat(x), out.view(-1, self.outputs)
        for span, shape, weights in self.parts:
            into[span].view(*shape, -1).baddbmm_(flat[span].view(*shape, -1), weights, alpha=scale)
        return out

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != self.tokens:
            raise RowsLost(f"a layer was given {len(flat)} tokens where the rows have {self.tokens}")
        return flat
