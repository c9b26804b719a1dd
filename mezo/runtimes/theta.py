"""Theta and its perturbed copies: the float32 master, stepped in one fused pass, and the proof of what was written."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from mezo.method.rules.base import UpdateRule
from mezo.method.step import StepUpdate, passes
from mezo_kernels import ParamLayout, RuleUpdate, rule_step_, step_

Pairs = list[tuple[ParamLayout, ParamLayout]]


class PerturbedTheta:
    """The float32 master theta and the places that theta + eps z_k and theta - eps z_k are written to.

    Nothing is ever restored by arithmetic: every copy is a single rounding of a sum formed from the master. Under a
    one-sided rule the minus copy of the first pair is theta, rounded once, and those of the others are not used.

    Args:
        master: float32.
        pairs: (plus, minus) of each perturbation that is held at once; the same elements, any dtype and strides.
        backend: of the fused ops; None chooses by device.
        rule: what an update does; its state lives here, zeros at first.
        watched: elements that a watched step compares, about; the reference is slow, and needs them several times. None
            compares all.
    """

    def __init__(
        self,
        master: ParamLayout,
        pairs: Sequence[tuple[ParamLayout, ParamLayout]],
        backend: str | None = None,
        rule: UpdateRule | None = None,
        watched: int | None = None,
    ):
        self.master, self.pairs, self.backend, self.rule = master, list(pairs), backend, rule or UpdateRule()
        self.state = [master.like([torch.zeros_like(t) for t in master.tensors]) for _ in range(self.rule.bytes // 4)]
        self.count = 0  # updates applied, as Adam counts them
        self._groups = self._grouped()
        self.watched, self._watched, self._watches = watched, None, 0
        self._perturbation: tuple[list[int], float | Sequence[float]] | None = None

    def _grouped(self) -> list[tuple[bool, ParamLayout, list[ParamLayout], Pairs]]:
        """(whether they decay, master, state, pairs) of the parameters that decay, and of the others: a pass each."""
        decays = [self.rule.decays(name) for name in self.master.names]
        if len(set(decays)) == 1:
            return [(decays[0], self.master, self.state, self.pairs)]

        def part(layout: ParamLayout, kind: bool) -> ParamLayout:
            return ParamLayout(slot for slot, own in zip(layout.slots, decays, strict=True) if own == kind)

        return [
            (kind, part(self.master, kind), [part(s, kind) for s in self.state],
             [(part(plus, kind), part(minus, kind)) for plus, minus in self.pairs])
            for kind in (True, False)
        ]  # fmt: skip

    def forget(self) -> None:
        """Set the rule's state to that of a new run: what belongs to another theta means nothing here."""
        self.count = 0
        for layout in self.state:
            torch._foreach_zero_(layout.tensors)

    def step(
        self, updates: Sequence[StepUpdate], seeds: Sequence[int], eps: float | Sequence[float], *, watch: bool = False
    ) -> None:
        """Apply the updates, then write theta +- eps z(seeds[k]) to pair k, in one pass; with `watch`, keep what
        `verify` needs. Pairs that differ in eps take a pass for each eps.
        """
        if watch:
            windows = _windows(self.master, self.watched, self._watches)
            before = [_within(layout, windows) for layout in (self.master, *self.state)]
            before = [layout.like([t.clone() for t in layout.tensors]) for layout in before]
            self._watched = windows, before, self.count, list(updates), list(seeds), eps
            self._watches += 1
        self._perturbation = list(seeds), eps
        used = [update for update in updates if not update.skipped]
        for first, after, distance in _runs(eps, len(seeds)):
            self._pass(used if first == 0 else [], seeds[first:after], distance, slice(first, after))
        self.count += len(used)
        if seeds and self.rule.one_sided:
            self.show([self.pairs[0][1]])

    def _pass(self, used: Sequence[StepUpdate], seeds: Sequence[int], eps: float, held: slice) -> None:
        """One fused pass: updates, then the pairs `held` at one eps."""
        options = {"distribution": self.rule.distribution, "backend": self.backend}
        for decays, master, state, pairs in self._groups:
            plus, minus = ([pair[sign] for pair in pairs[held]] for sign in (0, 1))
            own = used if decays else [_without_decay(update) for update in used]
            targets = (list(seeds), eps, plus, minus)
            rule = self.rule.fused(decays)
            if rule is None:
                step_(master, passes(own), 1.0, *targets, **options)
                continue
            steps = [RuleUpdate(u.seeds, u.coefficients, u.lr, t, u.decay) for t, u in enumerate(own, self.count + 1)]
            rule_step_(master, rule, state, steps, *targets, **options)

    def restore(self) -> None:
        """Write the perturbed copies of the last step anew: the same bits, whatever is there now."""
        self.step([], *self._perturbation)

    def show(self, copies: Sequence[ParamLayout]) -> None:
        """Write theta itself, rounded once, where perturbed copies are; `restore` undoes it."""
        for copy in copies:
            copy.copy_(self.master)

    def verify(self, used: Sequence[Sequence[torch.Tensor]] | None = None) -> str | None:
        """Rebuild with the reference what the watched step wrote; name the first element that differs, or None.

        Of a theta of more than `watched` elements some rows of each parameter are, others at each watched step.

        Args:
            used: tensors that the model reads, two lists for each pair; by default those that were written to.
        """
        windows, (master, *state), count, updates, seeds, eps = self._watched
        copies = [copy for pair in self.pairs[: len(seeds)] for copy in pair]
        fresh = [_within(copy, windows) for copy in copies]
        fresh = [copy.like([torch.empty_like(t) for t in copy.tensors]) for copy in fresh]
        master = master.like([t.clone() for t in master.tensors])
        again = PerturbedTheta(master, list(zip(fresh[::2], fresh[1::2], strict=True)), "reference", self.rule)
        again.count = count
        for layout, own in zip(again.state, state, strict=True):
            layout.copy_(own)
        again.step(updates, seeds, eps)
        seen = [layout.tensors for layout in (self.master, *self.state)]
        seen += used if used is not None else [copy.tensors for copy in copies]
        seen = [[_rows(t, own) for t, own in zip(tensors, windows, strict=True)] for tensors in seen]
        kinds = ["theta", *("first moment", "second moment")[: len(self.state)]]
        kinds += [f"{sign}{_of(k, len(seeds))}" for k in range(len(seeds)) for sign in ("plus", "minus")]
        for kind, expected, got in zip(kinds, (master, *again.state, *fresh), seen, strict=True):
            for name, a, b, own in zip(expected.names, expected.tensors, got, windows, strict=True):
                bits = torch.int32 if a.dtype == torch.float32 else torch.int16
                different = (a.contiguous().view(bits) != b.contiguous().view(bits)).flatten().nonzero()
                if len(different):
                    i = int(different[0])
                    at = i + own.start * (a[0].numel() if a.dim() else 1)
                    return f"{kind} of {name} at index {at}: expected {a.flatten()[i]:.9g}, got {b.flatten()[i]:.9g}"
        return None


def _windows(layout: ParamLayout, watched: int | None, turn: int) -> list[slice]:
    """Rows of each parameter that a watched step compares: all, or a share that moves on from turn to turn."""
    share, windows = min(1.0, watched / layout.n_elements) if watched else 1.0, []
    for tensor in layout.tensors:
        rows = len(tensor) if tensor.dim() else 1
        size = rows if tensor.dim() > 2 else max(1, math.floor(share * rows))  # blocks have one or two dimensions
        start = turn * size % rows
        windows.append(slice(start, min(start + size, rows)))
    return windows


def _within(layout: ParamLayout, windows: Sequence[slice]) -> ParamLayout:
    """The rows in the windows, in the same storage, with the z that they have in the whole."""
    return ParamLayout(
        dataclasses.replace(
            slot,
            tensor=_rows(slot.tensor, own),
            full_shape=slot.full_shape or tuple(slot.tensor.shape),
            row_start=slot.row_start + own.start,
        )
        for slot, own in zip(layout.slots, windows, strict=True)
    )


def _rows(tensor: torch.Tensor, window: slice) -> torch.Tensor:
    return tensor[window] if tensor.dim() else tensor


def _runs(eps: float | Sequence[float], n: int) -> list[tuple[int, int, float]]:
    """(first, after, eps) of the pairs, of n, that follow each other and have one eps; one empty run of none.

    >>> _runs(0.1, 2), _runs([0.1, 0.2, 0.2], 3)
    ([(0, 2, 0.1)], [(0, 1, 0.1), (1, 3, 0.2)])
    """
    if not isinstance(eps, Sequence) or not n:
        return [(0, n, eps if not isinstance(eps, Sequence) else 1.0)]
    runs, first = [], 0
    for value, own in itertools.groupby(eps):
        after = first + len(list(own))
        runs.append((first, after, value))
        first = after
    return runs


def _without_decay(update: StepUpdate) -> StepUpdate:
    return dataclasses.replace(update, decay=1.0)


def _of(k: int, n: int) -> str:
    return f" of perturbation {k}" if n > 1 else ""
