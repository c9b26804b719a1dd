"""Steps prepared once for tensors that stay where they are: a step then costs the host no look at each of them."""

import itertools
from collections.abc import Sequence

from mezo_kernels import dispatch
from mezo_kernels.layout import ParamLayout
from mezo_kernels.ops import _check, _check_eps, _check_state, _next_seeds, _pairs, _passes, _rule_rows
from mezo_kernels.rules import KINDS, Rule, RuleUpdate

LOOKS = 8  # tensors whose address is compared at a step, in turn: half a microsecond
Layouts = ParamLayout | Sequence[ParamLayout]


class _Prepared:
    """What both plans have: the tensors they are of, and the look at a few of them."""

    def __init__(
        self,
        layout: ParamLayout,
        plus: Layouts,
        minus: Layouts,
        distribution: str,
        backend: str | None,
        state: Sequence[ParamLayout] = (),
    ):
        _check(distribution, backend, layout.device, layout.names[0])
        self._plus, self._minus = ([one] if isinstance(one, ParamLayout) else list(one) for one in (plus, minus))
        if self._plus or self._minus:
            _pairs(layout, [0] * len(self._plus), 1.0, self._plus, self._minus, state)
        self.distribution, self.pairs = distribution, len(self._plus)

    def _prepare(self, op: str, backend: str | None, theta: ParamLayout, *state: ParamLayout) -> tuple:
        """Keep the layouts; returns what an op takes of theta, of plus, of minus, and of their geometry."""
        layouts = theta, *state, *self._plus, *self._minus
        self._storages = [tensor.untyped_storage() for one in layouts for tensor in one.tensors]
        self._places = itertools.cycle(
            [(one, i, tensor.data_ptr()) for one in layouts for i, tensor in enumerate(one.tensors)]
        )
        parts = ([theta], *([state] if op == "rule_step_" else []), self._plus, self._minus)
        tensors = ([tensor for one in part for tensor in one.tensors] for part in parts)
        return (op, backend, *tensors, [one.geometry for one in layouts])

    def _look(self) -> None:
        for layout, i, address in itertools.islice(self._places, LOOKS):
            if layout.tensors[i].data_ptr() != address:
                raise ValueError(f"{layout.names[i]} has moved since the plan was made; make a new plan")

    def _seeds(self, next_seed: int | Sequence[int] | None, eps: float | None) -> list[int]:
        seeds = _next_seeds(next_seed)
        if seeds:
            _check_eps(eps)
        if len(seeds) not in (0, self.pairs):
            raise ValueError(f"the plan has {self.pairs} pairs of plus and minus, got {len(seeds)} seeds")
        return seeds


class Plan(_Prepared):
    """`step_` on the same tensors again and again.

    A plan is of the tensors as they are when it is made, and keeps their storage alive. Where one of them moves
    (`layout.tensors[i] = ...`, `tensor.data = ...`) make a new plan; a few addresses are compared at every step, so
    that a plan that is out of date is refused soon, though not at once. torch.compile cannot trace a plan.

    Args:
        layout, plus, minus, distribution, backend: as in `step_`.
    Raises:
        ValueError: as `step_`.

    >>> import torch
    >>> w = torch.ones(4)
    >>> theta = ParamLayout({"w": w})
    >>> plan = Plan(theta, theta.like([torch.empty(4)]), theta.like([torch.empty(4)]))
    >>> plan.step_([(0, 0.1)], next_seed=1, eps=1e-3)
    >>> w
    tensor([1.0291, 0.9682, 1.0874, 0.8461])
    """

    def __init__(
        self,
        layout: ParamLayout,
        plus: Layouts = (),
        minus: Layouts = (),
        *,
        distribution: str = "normal",
        backend: str | None = None,
    ):
        super().__init__(layout, plus, minus, distribution, backend)
        self._run = dispatch.prepare(*self._prepare("step_", backend, layout))

    def step_(
        self,
        updates: Sequence[tuple],
        decay: float = 1.0,
        next_seed: int | Sequence[int] | None = None,
        eps: float | None = None,
    ) -> None:
        """One pass over theta, and to plus and minus where there is a next seed.

        Args:
            updates, decay, eps: as in `mezo_kernels.step_`.
            next_seed: a seed for each pair of plus and minus, or None.
        Raises:
            ValueError: another number of seeds than pairs, a value that is not finite, a tensor that has moved.
        """
        passes, seeds = _passes(updates, decay), self._seeds(next_seed, eps)
        self._look()
        self._run(dispatch.in_float32(passes), seeds, dispatch.float32(eps or 0.0), self.distribution)

    def recorded(self, n_updates: int = 1) -> "Recorded":
        """A step of this plan for a CUDA graph to repeat, each time with other numbers.

        Args:
            n_updates: most updates of a step, >= 1; a decay that is not 1 counts as one.
        Raises:
            ValueError: n_updates < 1.
        """
        if n_updates < 1:
            raise ValueError(f"a recorded step needs room for an update, got n_updates {n_updates}")
        return Recorded(self, n_updates)


class Recorded:
    """A step whose seeds, coefficients and eps lie in a buffer on the device. Made by `Plan.recorded`.

    A graph that captures `launch` reads the buffer at every replay: `set` the numbers of a step, then replay the
    graph. Without a graph `launch` does the step at once, on every backend.

    >>> import torch
    >>> w = torch.ones(4)
    >>> step = Plan(ParamLayout({"w": w})).recorded()
    >>> step.set([(0, 0.1)])
    >>> step.launch()
    >>> w
    tensor([1.0291, 0.9682, 1.0874, 0.8461])
    """

    def __init__(self, plan: Plan, n_updates: int):
        self.plan, self.n_updates = plan, n_updates
        self._buffer = dispatch.buffered(plan._run, n_updates, plan.pairs, plan.distribution)

    def set(
        self,
        updates: Sequence[tuple],
        decay: float = 1.0,
        next_seed: int | Sequence[int] | None = None,
        eps: float | None = None,
    ) -> None:
        """Write the numbers of the launches to come, in the order of the current stream, outside of any capture.

        Args:
            updates, decay, next_seed, eps: as in `Plan.step_`; a seed for each pair that the plan has.
        Raises:
            ValueError: as `Plan.step_`; more updates than there is room for; no seeds where there are pairs.
        """
        passes, seeds = _passes(updates, decay), self.plan._seeds(next_seed, eps)
        if len(passes) > self.n_updates or len(seeds) != self.plan.pairs:
            raise ValueError(
                f"expected at most {self.n_updates} updates, a decay among them, and {self.plan.pairs} seeds, got"
                f" {len(passes)} and {len(seeds)}"
            )
        self.plan._look()
        passes += [(0, 0.0, 1.0)] * (self.n_updates - len(passes))  # which change no bit
        self._buffer.write(dispatch.in_float32(passes), seeds, dispatch.float32(eps or 0.0))

    def launch(self) -> None:
        """The step, with the numbers that the buffer holds when the device comes to it."""
        self._buffer.launch()


class RulePlan(_Prepared):
    """`rule_step_` on the same tensors again and again; see `Plan`.

    Args:
        layout, rule, state, plus, minus, distribution, backend: as in `rule_step_`.
    Raises:
        ValueError: as `rule_step_`.

    >>> import torch
    >>> w, m = torch.ones(2), torch.zeros(2)
    >>> theta = ParamLayout({"w": w})
    >>> RulePlan(theta, Rule("momentum"), [theta.like([m])]).step_([RuleUpdate([0], [2.0], lr=0.5, t=1)])
    >>> w, m
    (tensor([1.2909, 0.6821]), tensor([-0.5817,  0.6358]))
    """

    def __init__(
        self,
        layout: ParamLayout,
        rule: Rule,
        state: Sequence[ParamLayout],
        plus: Layouts = (),
        minus: Layouts = (),
        *,
        distribution: str = "normal",
        backend: str | None = None,
    ):
        super().__init__(layout, plus, minus, distribution, backend, state)
        _check_state(layout, rule, state)
        self.rule, constants = rule, [dispatch.float32(value) for value in rule.constants]
        self._run = dispatch.prepare(*self._prepare("rule_step_", backend, layout, *state), KINDS[rule.kind], constants)

    def step_(
        self,
        updates: Sequence[RuleUpdate],
        next_seed: int | Sequence[int] | None = None,
        eps: float | None = None,
    ) -> None:
        """One pass over theta and its state, and to plus and minus where there is a next seed.

        Args:
            updates, eps: as in `rule_step_`.
            next_seed: a seed for each pair of plus and minus, or None.
        Raises:
            ValueError: as `rule_step_`, and as `Plan.step_`.
        """
        rows, seeds = _rule_rows(self.rule, updates), self._seeds(next_seed, eps)
        self._look()
        rows = [(seed, *map(dispatch.float32, numbers)) for seed, *numbers in rows]
        self._run(rows, seeds, dispatch.float32(eps or 0.0), self.distribution)
