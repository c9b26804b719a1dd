"""What each op means: contract, validation, and the call to a backend by way of `dispatch`.

Backends: `reference` (eager PyTorch, any device), `numba` (CPU), `triton` (CUDA, ROCm; CPU under TRITON_INTERPRET=1).
All give the same bits. The source of every formula is MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).
"""

import math
from collections.abc import Sequence

import torch

from mezo_kernels import dispatch
from mezo_kernels.layout import ParamLayout, check_no_alias
from mezo_kernels.philox import STREAMS, check_seed, halves, tensor_id
from mezo_kernels.rules import KINDS, Rule, RuleUpdate


def perturb_(
    layout: ParamLayout, scale: float, seed: int, *, distribution: str = "normal", backend: str | None = None
) -> ParamLayout:
    """theta <- theta + scale * z(seed), in place, one pass over all parameters.

    z is a vector of random numbers, one for each element of each parameter. An element's number depends on the seed, on
    the parameter's name and on the element's index alone. It is drawn where it is needed and never stored.

    Autograd does not see the ops: no graph records one, and version counters may stay as they are. Call none between a
    forward pass and its backward pass.

    Args:
        layout: the parameters theta, float32, bfloat16 or float16.
        scale: a finite float32 number; a Python float is rounded to float32.
        seed: 0 <= seed < 2**64.
        distribution: of each number of z, "normal" (mean 0, variance 1) or "rademacher" (-1 or +1).
        backend: which implementation runs, "reference", "numba" or "triton"; None chooses by the layout's device. All
            give the same bits.
    Returns:
        `layout`.
    Raises:
        ValueError: a bad seed, scale or distribution; a backend that cannot run on the layout's device.

    >>> w = torch.zeros(4)
    >>> _ = perturb_(ParamLayout({"w": w}), 1.0, seed=0)
    >>> w
    tensor([-0.2909,  0.3179, -0.8736,  1.5387])
    """
    _check(distribution, backend, layout.device, layout.names[0])
    _finite("scale", scale)
    check_seed(seed)
    dispatch.call("perturb_", layout.tensors, [layout.geometry], float(scale), *halves([seed]), distribution, backend)
    return layout


def step_(
    layout: ParamLayout,
    updates: Sequence[tuple],
    decay: float = 1.0,
    next_seed: int | Sequence[int] | None = None,
    eps: float | None = None,
    plus: ParamLayout | Sequence[ParamLayout] | None = None,
    minus: ParamLayout | Sequence[ParamLayout] | None = None,
    *,
    distribution: str = "normal",
    backend: str | None = None,
) -> ParamLayout:
    """theta <- theta * decay - sum_k c_k z(seed_k), then plus, minus <- theta +- eps z(next_seed): one pass.

    Each update is applied to theta in float32 registers, in order, every operation rounded on its own; theta is
    written once, and plus and minus are single roundings of the float32 values. With many updates this replays a run.

    Args:
        layout: the master theta; float32 where plus and minus are asked for.
        updates: (seed, coefficient) or (seed, coefficient, decay) each: theta <- theta * decay - coefficient * z(seed).
            0 <= seed < 2**64; the numbers are finite in float32. The coefficient is learning rate times projected
            gradient. One that rounds to zero is skipped, so it changes no bit.
        decay: 1 - learning rate * weight decay, finite, applied once before the updates; 1 is skipped.
        next_seed: seed of the next perturbation, 0 <= next_seed < 2**64, or a list of several. None writes none.
        eps: scale of the next perturbation, finite and > 0; needed with `next_seed`.
        plus, minus: the layouts that theta + eps z and theta - eps z are written to: the parameters and blocks of
            `layout`, any dtype and strides. Lists of as many as there are seeds where `next_seed` is a list.
        distribution, backend: as in `perturb_`.
    Returns:
        `layout`.
    Raises:
        ValueError: incomplete or contradictory arguments, aliased or mismatched layouts, values that are not finite.

    >>> w = torch.ones(4)
    >>> theta = ParamLayout({"w": w})
    >>> plus, minus = theta.like([torch.empty(4)]), theta.like([torch.empty(4)])
    >>> _ = step_(theta, [(0, 0.1)], next_seed=1, eps=1e-3, plus=plus, minus=minus)
    >>> w
    tensor([1.0291, 0.9682, 1.0874, 0.8461])
    >>> (plus.tensors[0] + minus.tensors[0]) / 2
    tensor([1.0291, 0.9682, 1.0874, 0.8461])
    """
    _check(distribution, backend, layout.device, layout.names[0])
    passes = _passes(updates, decay)
    seeds, plus, minus = _pairs(layout, next_seed, eps, plus, minus)
    dispatch.call(
        "step_",
        layout.tensors,
        [tensor for target in plus for tensor in target.tensors],
        [tensor for target in minus for tensor in target.tensors],
        [layout.geometry, *(target.geometry for target in (*plus, *minus))],
        halves([seed for seed, _, _ in passes]),
        [float(coefficient) for _, coefficient, _ in passes],
        [float(factor) for _, _, factor in passes],
        halves(seeds),
        float(eps or 0.0),
        distribution,
        backend,
    )
    return layout


def rule_step_(
    layout: ParamLayout,
    rule: Rule,
    state: Sequence[ParamLayout],
    updates: Sequence[RuleUpdate],
    next_seed: int | Sequence[int] | None = None,
    eps: float | None = None,
    plus: ParamLayout | Sequence[ParamLayout] | None = None,
    minus: ParamLayout | Sequence[ParamLayout] | None = None,
    *,
    distribution: str = "normal",
    backend: str | None = None,
) -> ParamLayout:
    """`step_` by a rule with state: read master and state once, apply the updates, write all and the next plus, minus.

    Args:
        layout: the master theta, float32.
        rule: what an update does to theta and to its state.
        state: `rule.states` layouts of the parameters and blocks of `layout`, float32, zeros before the first update:
            none for sign, m for momentum, m and v for Adam and AdamW.
        updates: one a step, in order; with many this replays a run.
        next_seed, eps, plus, minus, distribution, backend: as in `step_`.
    Returns:
        `layout`.
    Raises:
        ValueError: as `step_`; state that is not float32, or not of the same elements, or in the wrong number; an
            update without a seed, with another number of weights than seeds, or with t < 1.

    >>> w, m = torch.ones(2), torch.zeros(2)
    >>> theta = ParamLayout({"w": w})
    >>> _ = rule_step_(theta, Rule("sign"), [], [RuleUpdate([0], [0.5], lr=0.25, t=1)])
    >>> w  # z(0) is (-0.2909, 0.3179, ...)
    tensor([1.2500, 0.7500])
    >>> _ = rule_step_(theta, Rule("momentum"), [theta.like([m])], [RuleUpdate([0], [2.0], lr=0.0, t=1)])
    >>> m
    tensor([-0.5817,  0.6358])
    """
    _check(distribution, backend, layout.device, layout.names[0])
    _check_state(layout, rule, state)
    rows = _rule_rows(rule, updates)
    seeds, plus, minus = _pairs(layout, next_seed, eps, plus, minus, state)
    arguments = (
        layout.tensors,
        [tensor for one in state for tensor in one.tensors],
        [tensor for target in plus for tensor in target.tensors],
        [tensor for target in minus for tensor in target.tensors],
        [layout.geometry, *(one.geometry for one in (*state, *plus, *minus))],
        KINDS[rule.kind],
        rule.constants,
        halves([seed for seed, *_ in rows]),
        [number for _, *numbers in rows for number in numbers],
        halves(seeds),
        float(eps or 0.0),
        distribution,
        backend,
    )
    dispatch.call("rule_step_", *arguments)
    return layout


def standard_normal(
    seed: int,
    name: str,
    start: int,
    n_elements: int,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> torch.Tensor:
    """z ~ N(0, 1) of elements start .. start + n_elements of the parameter `name`.

    Args:
        seed: 0 <= seed < 2**64.
        name: canonical name of the parameter, see `canonical_name`.
        start: row-major index of the first element in the full parameter, >= 0.
        n_elements: how many, >= 0; start + n_elements < 2**63.
        device: where to put the result.
        backend: as in `perturb_`.
    Returns:
        float32 tensor (n_elements,), the same bits on every device and backend.
    Raises:
        ValueError: a bad seed or range; a backend that cannot run on the device.

    >>> standard_normal(0, "w", 0, 4)
    tensor([-0.2909,  0.3179, -0.8736,  1.5387])
    """
    return _elements(seed, name, start, n_elements, "normal", device, backend)


def rademacher(
    seed: int,
    name: str,
    start: int,
    n_elements: int,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> torch.Tensor:
    """z uniform on {-1, +1} of elements start .. start + n_elements of the parameter `name`.

    Args:
        seed, name, start, n_elements, device, backend: as in `standard_normal`.
    Returns:
        float32 tensor (n_elements,), the same bits on every device and backend.
    Raises:
        ValueError: a bad seed or range; a backend that cannot run on the device.

    >>> rademacher(42, "w", 0, 8)
    tensor([ 1., -1., -1.,  1., -1.,  1.,  1., -1.])
    """
    return _elements(seed, name, start, n_elements, "rademacher", device, backend)


def _elements(seed, name, start, n_elements, distribution, device, backend) -> torch.Tensor:
    device = torch.device(device)
    _check(distribution, backend, device, name)
    check_seed(seed)
    if not 0 <= start <= start + n_elements < 2**63:
        raise ValueError(f"expected 0 <= start and 0 <= n_elements, got start {start}, n_elements {n_elements}")
    arguments = (*halves([seed]), tensor_id(name), start, n_elements, distribution, device, backend)
    return dispatch.call("standard_normal", *arguments)


def _passes(updates: Sequence[tuple], decay: float) -> list[tuple[int, float, float]]:
    """(seed, coefficient, decay) of each pass over theta, checked."""
    passes = [(0, 0.0, decay)] if decay != 1 else []
    passes += [(*update, 1.0) if len(update) == 2 else tuple(update) for update in updates]
    for seed, coefficient, factor in passes:
        check_seed(seed)
        _finite("coefficient", coefficient)
        _finite("decay", factor)
    return passes


def _next_seeds(next_seed: int | Sequence[int] | None) -> list[int]:
    seeds = [next_seed] if isinstance(next_seed, int) else list(next_seed or [])
    return [check_seed(seed) for seed in seeds]


def _check_eps(eps: float | None) -> None:
    if eps is None or not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a finite number > 0 where next_seed is given, got {eps}")


def _pairs(layout, next_seed, eps, plus, minus, state=()):
    """Lists of next seeds, plus and minus layouts, checked once for each combination of layouts with `state`."""
    if next_seed is None and plus is None and minus is None:
        return [], [], []
    seeds = _next_seeds(next_seed)
    plus, minus = ([t] if isinstance(t, ParamLayout) else list(t or []) for t in (plus, minus))
    if not len(seeds) == len(plus) == len(minus):
        raise ValueError(
            f"next_seed, plus and minus must come together and in equal numbers, "
            f"got {len(seeds)} seeds, {len(plus)} plus and {len(minus)} minus layouts"
        )
    _check_eps(eps)
    targets = (*plus, *minus)
    key = tuple(one.serial for one in (*state, *targets))
    if key not in layout.checked_targets:
        _check_targets(layout, targets)
        if not torch.compiler.is_compiling():  # a traced program knows no addresses
            check_no_alias([slot for one in (layout, *state, *targets) for slot in one.slots])
            layout.checked_targets.add(key)
    return seeds, plus, minus


def _check_targets(layout: ParamLayout, targets: Sequence[ParamLayout]) -> None:
    for slot in layout.slots:
        if slot.tensor.dtype != torch.float32:
            raise ValueError(f"{slot.name}: plus and minus need a float32 master, got {slot.tensor.dtype}")
    for target in targets:
        if not layout.same_elements(target):
            raise ValueError("plus and minus must hold the same elements in the same order; build with layout.like()")
        if target.device != layout.device:
            name = layout.names[0]
            raise ValueError(f"{name}: plus and minus must be on {layout.device} like theta, got {target.device}")


def _rule_rows(rule: Rule, updates: Sequence[RuleUpdate]) -> list[tuple[int, float, float, float, float, float]]:
    """(seed, weight, 1 if it is the last of its update, rate, decay, root) of each z, checked."""
    rows = []
    for update in updates:
        _check_update(update)
        rate, root = rule.rate(update.lr, update.t)
        _finite("learning rate", rate)
        last = len(update.seeds) - 1
        for k, (seed, weight) in enumerate(zip(update.seeds, update.weights, strict=True)):
            rows.append((check_seed(seed), float(weight), float(k == last), rate, float(update.decay), root))
    return rows


def _check_update(update: RuleUpdate) -> None:
    if not len(update.seeds) == len(update.weights) >= 1:
        raise ValueError(f"an update needs a weight for each seed, got {len(update.seeds)} and {len(update.weights)}")
    if update.t < 1:
        raise ValueError(f"t counts updates from 1, got {update.t}")
    for weight in update.weights:
        _finite("weight", weight)
    _finite("decay", update.decay)


def _check_state(layout: ParamLayout, rule: Rule, state: Sequence[ParamLayout]) -> None:
    if len(state) != rule.states:
        raise ValueError(f"the rule {rule.kind} keeps {rule.states} layouts of state, got {len(state)}")
    key = ("state", *(one.serial for one in state))
    if key in layout.checked_targets:
        return
    for slot in (slot for one in (layout, *state) for slot in one.slots):
        if slot.tensor.dtype != torch.float32:
            raise ValueError(f"{slot.name}: a rule needs a float32 master and state, got {slot.tensor.dtype}")
    _check_targets(layout, state)
    if not torch.compiler.is_compiling():
        check_no_alias([slot for one in (layout, *state) for slot in one.slots])
        layout.checked_targets.add(key)


def _finite(what: str, value: float) -> None:
    if not math.isfinite(value) or abs(value) > 3.4028235e38:
        raise ValueError(f"{what} must be a finite float32 number, got {value}")


def _check(distribution: str, backend: str | None, device: torch.device, name: str) -> None:
    if distribution not in STREAMS:
        raise ValueError(f"distribution must be one of {', '.join(STREAMS)}; got {distribution!r}")
    dispatch.check_backend(backend, device)
    if device.type == "meta":
        raise ValueError(f"{name}: a meta tensor holds no numbers; load it onto a device first")
