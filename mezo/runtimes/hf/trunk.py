"""The trunk of a model: the layers that no adapted weight can influence, run once per row and kept.

Layers below the lowest adapted one give each row the same output at theta, theta + eps z and theta - eps z. Where no
key or value depends on theta either (the last layer alone is adapted, its k and v are not), the keys and values of
that layer are kept too and only the scored positions are run.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mezo.models.attention import ATTENTION, Known, attending
from mezo.progress import say, told
from mezo.runtimes.hf.passes import Layout, Pass
from mezo.runtimes.hf.reading import Reading
from mezo.runtimes.rows import Row, RowBatch

RECENT = 16  # calls whose entries are kept where no more are: instruments score a step's batch again
GROUP = 16  # rows whose trunk is computed together, fixed from the start: an entry's bits never depend on the batch


class _Captured(Exception):
    """Ends a forward pass once everything wanted of it is known."""


class _Each:
    """A sequence whose items are made as they are asked for."""

    def __init__(self, item: Callable[[int], object]):
        self.item = item

    def __getitem__(self, number: int):
        return self.item(number)


@dataclass
class Entry:
    """What is kept of one row.

    Args:
        hidden: (length, hidden_size) input of the first adapted layer, or (scored, hidden_size) with keys and values.
        key, value: (length, heads, head_dim) of the last layer, or None.
    """

    hidden: torch.Tensor
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.hidden, self.key, self.value) if t is not None)


class Trunk:
    """Splits a transformer at its first adapted layer and keeps the lower part's output.

    Args:
        reading: runs the model; called with attention_mask, position_ids.
        layers: of the model, in order.
        first: index of the first adapted layer.
        keep_kv: keep keys and values of the last layer and run the scored positions only (first is the last layer).
        causal: True for a decoder.
        layout: how rows are run.
        pad: token id to pad with.
        device, storage: where the model runs, and where entries are kept.
        limit: bytes of entries to keep; the least recently used groups go first.
    """

    def __init__(
        self,
        reading: Reading,
        layers: Sequence[nn.Module],
        first: int,
        *,
        keep_kv: bool,
        causal: bool,
        layout: Layout,
        pad: int,
        device: torch.device,
        storage: torch.device,
        limit: int,
    ):
        self.reading, self.layers, self.first = reading, layers, first
        self.keep_kv, self.causal, self.layout, self.pad = keep_kv, causal, layout, pad
        self.device, self.storage, self.limit = device, storage, limit
        self.rows: dict[str, list[list[Row]] | _Each] = {}
        self.place: dict[str, list[tuple[int, int]] | _Each] = {}
        self.passing: set[str] = set()
        self.recent: OrderedDict[tuple, list[Entry]] = OrderedDict()
        self.groups: OrderedDict[tuple[str, int], list[Entry]] = OrderedDict()
        self.nbytes, self.seconds, self.full = 0, 0.0, False
        self.tokens = 0
        self.attention = attention_of(layers[first])
        self.others: tuple | None = None  # stands for what a layer gives beside hidden states; None: it gives these

    def register(self, split: str, rows: Sequence[Row], *, kept: bool = True) -> None:
        """Divide a split's rows into groups of like length, which wastes little on padding.

        Args:
            split: its name.
            rows: in the order of the examples.
            kept: keep what is computed of them. Else each call computes its rows together, and they are forgotten some
                calls later: for rows that one step alone asks for, of which groups would cost more than they save.
        """
        if not kept:
            self.passing.add(split)
        self.rows[split], self.place[split] = [], []
        self.extend(split, rows)

    def extend(self, split: str, rows: Sequence[Row]) -> None:
        """Divide further rows of a split into groups of their own; what is kept of the others stays."""
        order, first = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)), len(self.rows[split])
        places = [divmod(at, GROUP) for at in sorted(range(len(rows)), key=order.__getitem__)]
        self.rows[split] += [[rows[i] for i in order[g : g + GROUP]] for g in range(0, len(rows), GROUP)]
        self.place[split] += [(first + group, at) for group, at in places]

    def register_one_by_one(self, split: str, row: Callable[[int], Row], *, kept: bool = True) -> None:
        """Give each row of a split a group of its own, which is computed when it is first used.

        Args:
            split: its name.
            row: by number.
            kept: see `register`.
        """
        if not kept:
            self.passing.add(split)
        self.rows[split], self.place[split] = _Each(lambda number: [row(number)]), _Each(lambda number: (number, 0))

    @torch.no_grad()
    def fill(self, split: str) -> int:
        """Compute a split's entries ahead of use, until all are there or the limit is reached; return the tokens."""
        filled, groups = 0, range(len(self.rows[split]))
        say(f"filling the trunk cache: {sum(map(len, self.rows[split])):,} rows of {split}")
        for group in told(groups, f"trunk cache, {split}, groups of rows"):
            before = len(self.groups)
            filled += self._fill((split, group))
            if len(self.groups) <= before:
                break
        return filled

    def clear(self) -> None:
        """Forget every entry, and what filling took."""
        self.groups.clear()
        self.recent.clear()
        self.nbytes, self.seconds, self.tokens, self.full = 0, 0.0, 0, False

    def hidden(
        self, split: str, indices: Sequence[int], batch: RowBatch, rows: Pass
    ) -> tuple[Callable[[], torch.Tensor], int]:
        """Gather the entries of rows.

        Args:
            split: of the rows.
            indices: numbers of the rows in it.
            batch: the rows themselves.
            rows: how they are run, where more than scored positions are.
        Returns:
            A function, and the tokens whose trunk was run for it. The function runs the rest of the model and gives
            its outputs at the scored positions; it may be called again after the adapted weights have changed.
        """
        passing = split in self.passing
        entries, filled = self._passing(split, indices, batch) if passing else self._kept(split, indices)
        if not self.keep_kv:
            whole = rows.joined([entry.hidden for entry in entries]).to(self.device)

            def run() -> torch.Tensor:
                with rows.running():
                    return rows.results(self._run(rows.ids, rows.positions, whole, **rows.inputs))

            return run, filled
        hidden, keys, values = (
            pad_sequence([getattr(e, n) for e in entries], batch_first=True) for n in ("hidden", "key", "value")
        )
        hidden = hidden.to(self.device)
        known = (keys.transpose(1, 2).to(self.device), values.transpose(1, 2).to(self.device), self._known_mask(batch))
        ids = batch.ids.gather(1, batch.positions)
        return lambda: self._run(ids, None, hidden, known, position_ids=batch.positions), filled

    def _kept(self, split: str, indices: Sequence[int]) -> tuple[list[Entry], int]:
        """The entries of rows, and the tokens of those that were computed for it."""
        filled, entries = 0, []
        for index in indices:
            group, at = self.place[split][index]
            if (split, group) not in self.groups:
                filled += self._fill((split, group))
            self.groups.move_to_end((split, group))
            entries.append(self.groups[split, group][at])
        return entries, filled

    def _passing(self, split: str, indices: Sequence[int], batch: RowBatch) -> tuple[list[Entry], int]:
        """The entries of a batch's rows, computed together, each row once, and soon forgotten; and their tokens."""
        call = (split, *indices)
        if call in self.recent:
            return self.recent[call], 0
        places = sorted({index: place for place, index in enumerate(indices)}.values())
        lengths, entries = batch.lengths[places].tolist(), {}
        for group in self.layout.groups(lengths):
            rows = [places[n] for n in group]
            entries |= zip((indices[row] for row in rows), self._capture(batch.part(rows)), strict=True)
        self.recent[call] = [entries[index] for index in indices]
        if len(self.recent) > RECENT:
            self.recent.popitem(last=False)
        return self.recent[call], sum(lengths)

    def _known_mask(self, batch: RowBatch) -> torch.Tensor:
        at = torch.arange(int(batch.lengths.max()), device=self.device)
        last = batch.positions if self.causal else (batch.lengths - 1)[:, None].expand_as(batch.positions)
        return (at <= last[:, :, None])[:, None]

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None,
        hidden: torch.Tensor,
        known: Known | None = None,
        **inputs,
    ) -> torch.Tensor:
        """Run the model from the first adapted layer on.

        Args:
            ids: (rows, length) token ids, of which the model sees the shape alone.
            positions: see `Reading.outputs`.
            hidden: (rows, length, hidden_size), what comes out of the layers below.
            known: keys and values of the last layer, if they are known.
            inputs: other arguments of the model.
        Returns:
            See `Reading.outputs`.
        """
        first = self.layers[self.first]
        replace = first.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        self._skip(True)
        try:
            with attending(self.attention, known):
                return self.reading.outputs(ids, positions, **inputs, **no_cache(self.causal))
        finally:
            self._skip(False)
            replace.remove()

    def _skip(self, on: bool) -> None:
        for layer in itertools.islice(self.layers, self.first):
            if on:
                layer.forward = self._identity
            else:
                del layer.forward

    def _identity(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor | tuple:
        return hidden_states if self.others is None else (hidden_states, *self.others)

    def _fill(self, key: tuple[str, int]) -> int:
        """Compute the entries of a group; return its number of tokens."""
        started = time.perf_counter()
        split, group = key
        rows = self.rows[split][group]
        entries = self._capture(RowBatch.of(rows, self.pad, self.device))
        self.groups[key] = entries
        self.nbytes += sum(entry.nbytes for entry in entries)
        while self.nbytes > self.limit and len(self.groups) > 1:
            self.full = True
            _, gone = self.groups.popitem(last=False)
            self.nbytes -= sum(entry.nbytes for entry in gone)
        self.seconds += time.perf_counter() - started
        tokens = sum(len(row.ids) for row in rows)
        self.tokens += tokens
        return tokens

    def _capture(self, batch: RowBatch) -> list[Entry]:
        rows, seen = self.layout.of(batch), {}

        def stop_at_layer(module, args):
            seen["hidden"] = args[0]
            if not self.keep_kv:
                raise _Captured

        def stop_at_attention(key, value):
            seen["key"], seen["value"] = key.transpose(1, 2), value.transpose(1, 2)
            raise _Captured

        def see(module, args, output):
            self.others = (None,) * (len(output) - 1) if isinstance(output, tuple) else None

        hook = self.layers[self.first].register_forward_pre_hook(stop_at_layer)
        below = self.layers[0].register_forward_hook(see)  # it is the first itself where nothing lies below
        try:
            known = attending(self.attention, stop_at_attention if self.keep_kv else None)
            with known, rows.running(), suppress(_Captured):
                self.reading.outputs(rows.ids, None, **rows.inputs, **no_cache(self.causal))
        finally:
            hook.remove()
            below.remove()
        # copies: a view would keep its neighbours alive
        stored = {
            name: [part.to(self.storage, copy=True).contiguous() for part in rows.apart(whole)]
            for name, whole in seen.items()
        }
        if not self.keep_kv:
            return [Entry(hidden) for hidden in stored["hidden"]]
        read = [positions[valid] for positions, valid in zip(batch.positions, batch.valid, strict=True)]
        hidden = [each.index_select(0, at.to(self.storage)) for each, at in zip(stored["hidden"], read, strict=True)]
        return [Entry(*parts) for parts in zip(hidden, stored["key"], stored["value"], strict=True)]


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module of a layer that calls the attention of `mezo.models.attention`, None if there is none."""
    modules = (m for m in layer.modules() if all(hasattr(m, name) for name in ("is_causal", "layer_idx", "config")))
    return next((m for m in modules if m.config._attn_implementation == ATTENTION), None)


def no_cache(causal: bool) -> dict:
    """Arguments that stop a decoder from building a generation cache, which costs a millisecond and is thrown away."""
    return {"use_cache": False} if causal else {}
