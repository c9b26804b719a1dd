"""`step_` prepared once for tensors that stay where they are: a step then costs the host no look at each of them."""

import itertools
from collections.abc import Sequence

from mezo_kernels import dispatch
from mezo_kernels.layout import ParamLayout
from mezo_kernels.ops import _check, _check_eps, _next_seeds, _pairs, _passes

LOOKS = 8  # tensors whose address is compared at a step, in turn: half a microsecond


class Plan:
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
        plus: ParamLayout | Sequence[ParamLayout] = (),
        minus: ParamLayout | Sequence[ParamLayout] = (),
        *,
        distribution: str = "normal",
        backend: str | None = None,
    ):
        _check(distribution, backend, layout.device, layout.names[0])
        plus, minus = ([one] if isinstance(one, ParamLayout) else list(one) for one in (plus, minus))
        if plus or minus:
            _pairs(layout, [0] * len(plus), 1.0, plus, minus)
        self.distribution, self.pairs = distribution, len(plus)
        layouts = layout, *plus, *minus
        self._storages = [tensor.untyped_storage() for one in layouts for tensor in one.tensors]
        self._run = dispatch.prepare_step(
            backend,
            list(layout.tensors),
            [tensor for one in plus for tensor in one.tensors],
            [tensor for one in minus for tensor in one.tensors],
            [one.geometry for one in layouts],
        )
        self._places = itertools.cycle(
            [(one, i, tensor.data_ptr()) for one in layouts for i, tensor in enumerate(one.tensors)]
        )

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
        passes, seeds = _passes(updates, decay), _next_seeds(next_seed)
        if seeds:
            _check_eps(eps)
        if len(seeds) not in (0, self.pairs):
            raise ValueError(f"the plan has {self.pairs} pairs of plus and minus, got {len(seeds)} seeds")
        for layout, i, address in itertools.islice(self._places, LOOKS):
            if layout.tensors[i].data_ptr() != address:
                raise ValueError(f"{layout.names[i]} has moved since the plan was made; make a new plan")
        self._run(dispatch.in_float32(passes), seeds, dispatch.float32(eps or 0.0), self.distribution)
