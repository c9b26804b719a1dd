"""Theta and its perturbed copies: the float32 master, stepped in one fused pass, and the proof of what was written."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Step, Update
from mezo_kernels import ParamLayout, Plan, RulePlan, RuleUpdate, anchored_decay_, step_

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
        rule: LoggedRule | None = None,
        watched: int | None = None,
    ):
        self.master, self.pairs, self.backend = master, list(pairs), backend
        self.logged = rule or LoggedRule()
        self.rule = self.logged.rule
        moments = self.rule.state_bytes // 4
        self.state = [master.like([torch.zeros_like(t) for t in master.tensors]) for _ in range(moments)]
        self.count = 0  # updates applied, as Adam counts them
        self._begin_here()
        self.watched, self._watched, self._watches = watched, None, 0
        self._held: Step | None = None
        self._moved: ParamLayout | None = None  # theta + eps v before it is rounded, of a rule that guides

    def _begin_here(self, start: dict[str, torch.Tensor] | None = None) -> None:
        """Take theta_0, by default the master as it is, for what it decays towards, and group parameters accordingly.

        Anchored decay towards zero is plain decay, so theta_0 is held of parameters that do not start there alone.
        """
        if start is None and self.logged.anchored:
            tensors = zip(self.master.names, self.master.tensors, strict=True)
            start = {name: t.clone() for name, t in tensors if self.logged.decays(name) and t.any()}
        self.start = start or {}
        self._groups = self._grouped()
        self._plans: dict[tuple, Plan | RulePlan] = {}

    def _grouped(self) -> list[tuple[str, ParamLayout, list[ParamLayout], Pairs]]:
        """(decay, master, state, pairs) of the parameters that decay to zero ("zero"), to theta_0 ("start"), and not at
        all ("none"): a pass each."""
        decays = self.logged.decays
        kinds = ["start" if n in self.start else "zero" if decays(n) else "none" for n in self.master.names]
        if len(set(kinds)) == 1:
            return [(kinds[0], self.master, self.state, self.pairs)]

        def part(layout: ParamLayout, kind: str) -> ParamLayout:
            return ParamLayout(slot for slot, own in zip(layout.slots, kinds, strict=True) if own == kind)

        return [
            (kind, part(self.master, kind), [part(s, kind) for s in self.state],
             [(part(plus, kind), part(minus, kind)) for plus, minus in self.pairs])
            for kind in ("zero", "start", "none") if kind in kinds
        ]  # fmt: skip

    def forget(self) -> None:
        """Begin anew: state of a rule, and what decay goes towards, belong to another theta and mean nothing here."""
        self.count = 0
        if self.logged.anchored:
            self._begin_here()
        for layout in self.state:
            torch._foreach_zero_(layout.tensors)

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """Apply the updates, then write theta +- eps_k z(seed_k) of a step to pair k: one pass over all parameters.

        Perturbations that differ in eps take a pass for each eps, one along several z a pass for each sign.

        Args:
            updates: in order; one that is skipped changes nothing, state neither.
            then: the perturbations to write, at most as many as there are pairs; None writes none.
            watch: keep what `verify` needs.
        """
        if watch:
            self._watch(updates, then)
        applied = [update for update in updates if not update.skipped]
        if then is None or not len(then):
            self._pass(applied)
        elif then.weights:
            self._held = then
            self._pass(applied)
            self._write_along(then)
        else:
            self._held = then
            for k, places in enumerate(_of_one_eps(then)):
                self._pass([] if k else applied, then.part(places), slice(places[0], places[-1] + 1))
            if self.rule.one_sided:
                self.show([self.pairs[0][1]])
        self.count += len(applied)

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """Write the perturbed copies of a step; theta stays as it is. See `update`."""
        self.update([], step, watch=watch)

    def _write_along(self, step: Step) -> None:
        """Write theta + sum_k c_k z_k and theta - sum_k c_k z_k to the first pair, c_k = eps_k weights_k.

        Summed in float32 from theta on, in the order of the seeds, and rounded once, as an update is.
        """
        if self._moved is None:
            self._moved = self.master.like([torch.empty_like(t) for t in self.master.tensors])
        options = {"distribution": self.rule.distribution, "backend": self.backend}
        for copy, sign in zip(self.pairs[0], (1.0, -1.0), strict=True):
            self._moved.copy_(self.master)
            step_(self._moved, [(seed, -sign * c, 1.0) for seed, c in step.along()], **options)
            copy.copy_(self._moved)

    def _watch(self, updates: Sequence[Update], then: Step | None) -> None:
        windows = _windows(self.master, self.watched, self._watches)
        before = [_within(layout, windows) for layout in (self.master, *self.state)]
        before = [layout.like([t.clone() for t in layout.tensors]) for layout in before]
        of = dict(zip(self.master.names, windows, strict=True))
        start = {name: _part(tensor, of[name]) for name, tensor in self.start.items()}
        self._watched = windows, before, self.count, list(updates), then, start
        self._watches += 1

    def _pass(self, updates: Sequence[Update], step: Step | None = None, places: slice = slice(0)) -> None:
        """One fused pass: updates, then the pairs at `places`, whose perturbations have one eps."""
        following = (list(step.seeds), step.eps[0]) if step else ()
        for i, (decay, *_) in enumerate(self._groups):
            if decay == "start":
                self._pass_anchored(i, updates, following, places)
                continue
            applied = updates if decay == "zero" else [_without_decay(update) for update in updates]
            self._step(i, applied, self.count, following, places)

    def _pass_anchored(self, group: int, updates: Sequence[Update], following: tuple, places: slice) -> None:
        """As `_pass`, of parameters that decay towards theta_0: each update is a pass after its decay."""
        master = self._groups[group][1]
        start = [self.start[name] for name in master.names]
        for n, update in enumerate(updates):
            anchored_decay_(master.tensors, start, update.decay)
            last = n == len(updates) - 1
            self._step(
                group, [_without_decay(update)], self.count + n, following if last else (), places if last else slice(0)
            )
        if not updates:
            self._step(group, [], self.count, following, places)

    def _step(self, group: int, updates: Sequence[Update], count: int, following: tuple, places: slice) -> None:
        """One fused pass over one group, after so many updates."""
        kernel = self.logged.kernel(self._groups[group][0] != "none")
        if kernel is None:
            directions = [direction for update in updates for direction in update.directions()]
            self._plan(group, places).step_(directions, 1.0, *following)
            return
        numbered = enumerate(updates, count + 1)
        steps = [RuleUpdate(u.seeds, u.coefficients, u.lr, t, u.decay) for t, u in numbered]
        self._plan(group, places).step_(steps, *following)

    def _plan(self, group: int, places: slice) -> Plan | RulePlan:
        """Of the steps of one group, which write the pairs at `places`."""
        key = group, places.start, places.stop
        if key not in self._plans:
            decay, master, state, pairs = self._groups[group]
            kernel, targets = self.logged.kernel(decay != "none"), _signs(pairs[places])
            options = {"distribution": self.rule.distribution, "backend": self.backend}
            if kernel is None:
                self._plans[key] = Plan(master, *targets, **options)
            else:
                self._plans[key] = RulePlan(master, kernel, state, *targets, **options)
        return self._plans[key]

    def restore(self) -> None:
        """Write the perturbed copies of the last step anew: the same bits, whatever is there now."""
        self.perturb(self._held)

    def show(self, copies: Sequence[ParamLayout]) -> None:
        """Write theta itself, rounded once, where perturbed copies are; `restore` undoes it."""
        for copy in copies:
            copy.copy_(self.master)

    def verify(self, used: Sequence[Sequence[torch.Tensor]] | None = None) -> str | None:
        """Rebuild with the reference what the watched step wrote; name the first element that differs, or None.

        Of a theta of more than `watched` elements a slice of each parameter is, another at each watched step.

        Args:
            used: tensors that the model reads, two lists for each pair; by default those that were written to.
        """
        windows, (master, *state), count, updates, then, start = self._watched
        n = len(then) if then else 0
        copies = [copy for pair in self.pairs[:n] for copy in pair]
        fresh = [_within(copy, windows) for copy in copies]
        fresh = [copy.like([torch.empty_like(t) for t in copy.tensors]) for copy in fresh]
        master = master.like([t.clone() for t in master.tensors])
        again = PerturbedTheta(master, list(zip(fresh[::2], fresh[1::2], strict=True)), "reference", self.logged)
        again.count = count
        again._begin_here(start)
        for layout, before in zip(again.state, state, strict=True):
            layout.copy_(before)
        again.update(updates, then)
        seen = [layout.tensors for layout in (self.master, *self.state)]
        seen += used if used is not None else [copy.tensors for copy in copies]
        seen = [[_part(t, window) for t, window in zip(tensors, windows, strict=True)] for tensors in seen]
        kinds = ["theta", *("first moment", "second moment")[: len(self.state)]]
        kinds += [f"{sign}{_of(k, n)}" for k in range(n) for sign in ("plus", "minus")]
        for kind, expected, got in zip(kinds, (master, *again.state, *fresh), seen, strict=True):
            for name, a, b, window in zip(expected.names, expected.tensors, got, windows, strict=True):
                bits = torch.int32 if a.dtype == torch.float32 else torch.int16
                different = (a.contiguous().view(bits) != b.contiguous().view(bits)).flatten().nonzero()
                if len(different):
                    i = int(different[0])
                    at = i + window.start * (a[0].numel() if a.dim() else 1)
                    return f"{kind} of {name} at index {at}: expected {a.flatten()[i]:.9g}, got {b.flatten()[i]:.9g}"
        return None


def _without_decay(update: Update) -> Update:
    return dataclasses.replace(update, decay=1.0)


def _windows(layout: ParamLayout, watched: int | None, turn: int) -> list[slice]:
    """Indices along the first dimension that a watched step compares: all, or a share that moves on with each turn."""
    share, windows = min(1.0, watched / layout.n_elements) if watched else 1.0, []
    for tensor in layout.tensors:
        length = len(tensor) if tensor.dim() else 1
        size = length if tensor.dim() > 2 else max(1, math.floor(share * length))  # blocks have one or two dimensions
        start = turn * size % length
        windows.append(slice(start, min(start + size, length)))
    return windows


def _within(layout: ParamLayout, windows: Sequence[slice]) -> ParamLayout:
    """The elements in the windows, in the same storage, with the z that they have in the whole."""
    parts = [_part(tensor, window) for tensor, window in zip(layout.tensors, windows, strict=True)]
    if sum(part.numel() for part in parts) == layout.n_elements:
        return layout
    return ParamLayout(
        dataclasses.replace(
            slot,
            tensor=part,
            full_shape=slot.full_shape or tuple(slot.tensor.shape),
            row_start=slot.row_start + window.start,
        )
        for slot, part, window in zip(layout.slots, parts, windows, strict=True)
    )


def _part(tensor: torch.Tensor, window: slice) -> torch.Tensor:
    return tensor[window] if tensor.dim() else tensor


def _signs(pairs: Pairs) -> tuple[list[ParamLayout], list[ParamLayout]]:
    """The plus and the minus of each."""
    return [plus for plus, _ in pairs], [minus for _, minus in pairs]


def _of_one_eps(step: Step) -> list[list[int]]:
    """Places of the perturbations that follow each other and have one eps.

    >>> _of_one_eps(Step([7, 8, 9], [0.1, 0.2, 0.2]))
    [[0], [1, 2]]
    """
    return [list(places) for _, places in itertools.groupby(range(len(step)), step.eps.__getitem__)]


def _of(k: int, n: int) -> str:
    return f" of perturbation {k}" if n > 1 else ""
