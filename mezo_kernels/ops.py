"""What each op means: contract, validation, registration with torch.library, dispatch to a backend.

Backends: `reference` (eager PyTorch, any device), `numba` (CPU), `triton` (CUDA, ROCm; CPU under TRITON_INTERPRET=1).
All three give the same bits. The source of every formula is MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).
"""

import importlib
import math
import os
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mezo_kernels.layout import ParamLayout, check_no_alias
from mezo_kernels.philox import STREAMS, check_seed, tensor_id

_MODULES = {"reference": "mezo_kernels.reference", "numba": "mezo_kernels.cpu", "triton": "mezo_kernels.triton"}
_BY_DEVICE = {"cpu": "numba", "cuda": "triton"}
_LIBRARY = torch.library.Library("mezo_kernels", "DEF")

_LIBRARY.define(
    "perturb_(Tensor(a!)[] theta, Tensor[] geometry, float scale, SymInt seed_low, SymInt seed_high,"
    " str distribution, str? backend) -> ()"
)
_LIBRARY.define(
    "step_(Tensor(a!)[] theta, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor[] geometry, SymInt[] update_seeds,"
    " float[] coefficients, float[] decays, SymInt[] next_seeds, float eps, str distribution, str? backend) -> ()"
)
_LIBRARY.define(
    "sum_of_squares(Tensor[] theta, Tensor[] geometry, SymInt seed_low, SymInt seed_high, str distribution,"
    " str? backend) -> Tensor"
)
_LIBRARY.define(
    "standard_normal(SymInt seed_low, SymInt seed_high, int tensor_id, SymInt start, SymInt n_elements,"
    " str distribution, Device device, str? backend) -> Tensor"
)
_OPS = torch.ops.mezo_kernels


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Names of the backends that run on a device.

    >>> available_backends("cpu")[:2]
    ['reference', 'numba']
    """
    device = torch.device(device)
    return [name for name in _MODULES if _unavailable(name, device) is None]


def perturb_(
    layout: ParamLayout, scale: float, seed: int, *, distribution: str = "normal", backend: str | None = None
) -> ParamLayout:
    """theta <- theta + scale * z(seed), in place, one pass over all parameters.

    Args:
        layout: the parameters theta, float32, bfloat16 or float16.
        scale: finite; rounded to float32.
        seed: 0 <= seed < 2**64.
        distribution: "normal" or "rademacher".
        backend: None (by device), "reference", "numba" or "triton".
    Returns:
        `layout`.
    Raises:
        ValueError: a bad seed, scale or distribution; a backend that cannot run on the layout's device.

    >>> w = torch.zeros(4)
    >>> _ = perturb_(ParamLayout({"w": w}), 1.0, seed=0)
    >>> w
    tensor([-0.2909,  0.3179, -0.8736,  1.5387])
    """
    _check(distribution, backend, layout.device)
    _finite("scale", scale)
    check_seed(seed)
    low, high = seed & 0xFFFFFFFF, seed >> 32
    _call("perturb_", layout.tensors, [layout.geometry], float(scale), low, high, distribution, backend)
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
            The coefficient is lr * projected_grad; one that rounds to zero is skipped, so it changes no bit.
        decay: 1 - lr * weight_decay, applied once before the updates; 1 is skipped.
        next_seed, plus, minus: the next perturbation and the layouts it is written to (same parameters and blocks
            as `layout`, any dtype and strides), or lists of equal length for several.
        eps: perturbation scale, > 0; needed with `next_seed`.
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
    _check(distribution, backend, layout.device)
    passes = [(0, 0.0, decay)] if decay != 1 else []
    passes += [(*update, 1.0) if len(update) == 2 else tuple(update) for update in updates]
    for seed, coefficient, factor in passes:
        check_seed(seed)
        _finite("coefficient", coefficient)
        _finite("decay", factor)
    seeds, plus, minus = _pairs(layout, next_seed, eps, plus, minus)
    _call(
        "step_",
        layout.tensors,
        [tensor for target in plus for tensor in target.tensors],
        [tensor for target in minus for tensor in target.tensors],
        [layout.geometry, *(target.geometry for target in (*plus, *minus))],
        _halves([seed for seed, _, _ in passes]),
        [float(coefficient) for _, coefficient, _ in passes],
        [float(factor) for _, _, factor in passes],
        _halves(seeds),
        float(eps or 0.0),
        distribution,
        backend,
    )
    return layout


def sum_of_squares(
    layout: ParamLayout, seed: int, *, distribution: str = "normal", backend: str | None = None
) -> float:
    """Sum of z(seed)**2 over the layout's elements, in float64.

    Args:
        layout: which elements; their storage is not read.
        seed, distribution, backend: as in `perturb_`.

    >>> round(sum_of_squares(ParamLayout({"w": torch.zeros(4)}), seed=0), 6)
    3.316516
    """
    _check(distribution, backend, layout.device)
    check_seed(seed)
    halves = seed & 0xFFFFFFFF, seed >> 32
    return _call("sum_of_squares", layout.tensors, [layout.geometry], *halves, distribution, backend).item()


def standard_normal(
    seed: int, name: str, start: int, n_elements: int, device="cpu", backend: str | None = None
) -> torch.Tensor:
    """z ~ N(0, 1) of elements start .. start + n_elements of the parameter `name`.

    Args:
        seed: 0 <= seed < 2**64.
        name: canonical parameter name.
        start: row-major index of the first element in the full parameter, >= 0.
        n_elements: how many, >= 0.
        device: where to put the result.
        backend: as in `perturb_`.
    Returns:
        float32 tensor (n_elements,), the same bits on every device and backend.

    >>> standard_normal(0, "w", 0, 4)
    tensor([-0.2909,  0.3179, -0.8736,  1.5387])
    """
    return _elements(seed, name, start, n_elements, "normal", device, backend)


def rademacher(
    seed: int, name: str, start: int, n_elements: int, device="cpu", backend: str | None = None
) -> torch.Tensor:
    """z uniform on {-1, +1} of elements start .. start + n_elements of the parameter `name`; see `standard_normal`.

    >>> rademacher(42, "w", 0, 8)
    tensor([ 1., -1., -1.,  1., -1.,  1.,  1., -1.])
    """
    return _elements(seed, name, start, n_elements, "rademacher", device, backend)


def _elements(seed, name, start, n_elements, distribution, device, backend) -> torch.Tensor:
    device = torch.device(device)
    _check(distribution, backend, device)
    check_seed(seed)
    if not 0 <= start <= start + n_elements < 2**63:
        raise ValueError(f"expected 0 <= start and 0 <= n_elements, got start {start}, n_elements {n_elements}")
    halves = seed & 0xFFFFFFFF, seed >> 32
    return _call("standard_normal", *halves, tensor_id(name), start, n_elements, distribution, device, backend)


def _pairs(layout, next_seed, eps, plus, minus):
    """Lists of next seeds, plus and minus layouts, checked once for each combination of layouts."""
    if next_seed is None and plus is None and minus is None:
        return [], [], []
    seeds = [next_seed] if isinstance(next_seed, int) else list(next_seed or [])
    plus, minus = ([t] if isinstance(t, ParamLayout) else list(t or []) for t in (plus, minus))
    if not len(seeds) == len(plus) == len(minus):
        raise ValueError(
            f"next_seed, plus and minus must come together and in equal numbers, "
            f"got {len(seeds)} seeds, {len(plus)} plus and {len(minus)} minus layouts"
        )
    if eps is None or not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a finite number > 0 where next_seed is given, got {eps}")
    for seed in seeds:
        check_seed(seed)
    targets = (*plus, *minus)
    key = tuple(target.serial for target in targets)
    if key not in layout.checked_targets:
        _check_targets(layout, targets)
        if not torch.compiler.is_compiling():  # a traced program knows no addresses
            check_no_alias([slot for one in (layout, *targets) for slot in one.slots])
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
            raise ValueError(f"plus and minus must be on {layout.device} like theta, got {target.device}")


def _call(op: str, *arguments):
    """The op by torch.library where somebody traces, and directly where nobody does: boxing 448 tensors costs 65 us."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return getattr(_OPS, op)(*arguments)
    return _IMPLEMENTATIONS[op](*arguments)


def _halves(seeds: list[int]) -> list[int]:
    return [half for seed in seeds for half in (seed & 0xFFFFFFFF, seed >> 32)]


def _seeds(halves: Sequence[int]) -> list[int]:
    return [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]


def _finite(what: str, value: float) -> None:
    if not math.isfinite(value) or abs(value) > 3.4028235e38:
        raise ValueError(f"{what} must be a finite float32 number, got {value}")


def _check(distribution: str, backend: str | None, device: torch.device) -> None:
    if distribution not in STREAMS:
        raise ValueError(f"distribution must be one of {', '.join(STREAMS)}; got {distribution!r}")
    if backend is None:
        if device.type not in _BY_DEVICE and device.type != "meta":
            raise ValueError(f"no compiled backend for device {device}; pass backend='reference'")
        return
    if backend not in _MODULES:
        raise ValueError(f"backend must be one of {', '.join(_MODULES)}; got {backend!r}")
    reason = _unavailable(backend, device)
    if reason:
        raise ValueError(f"backend {backend!r} is not available on {device}: {reason}")


def _unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None."""
    if backend == "numba" and device.type != "cpu":
        return "it runs on CPU tensors only"
    if backend == "triton":
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a CUDA or ROCm device, or TRITON_INTERPRET=1 set before Python starts"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type != "cuda" and _interpreter_is_broken():
            return "Triton's interpreter before 3.7 does not run with numpy 2.4 or later"
    return None


def _interpreter_is_broken() -> bool:
    """Triton 3.6's `tl.range` converts an array of one element to a number, which numpy has stopped to do."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton < (3, 7) and numpy >= (2, 4)


def _module(backend: str | None, device: torch.device):
    return importlib.import_module(_MODULES[backend or _BY_DEVICE[device.type]])


def _float32(value: float) -> float:
    return float(np.float32(value))


def _perturb(theta, geometry, scale, seed_low, seed_high, distribution, backend):
    seed = seed_low | seed_high << 32
    _module(backend, theta[0].device).perturb_(theta, geometry, _float32(scale), seed, distribution)


def _step(
    theta, plus, minus, geometry, update_seeds, coefficients, decays, next_seeds, eps, distribution, backend
):  # fmt: skip
    updates = [
        (seed, _float32(coefficient), _float32(decay))
        for seed, coefficient, decay in zip(_seeds(update_seeds), coefficients, decays, strict=True)
    ]
    run = _module(backend, theta[0].device).step_
    run(theta, plus, minus, geometry, updates, _seeds(next_seeds), _float32(eps), distribution)


def _sum_of_squares(theta, geometry, seed_low, seed_high, distribution, backend):
    seed = seed_low | seed_high << 32
    total = _module(backend, theta[0].device).sum_of_squares(theta, geometry, seed, distribution)
    return torch.as_tensor(total, dtype=torch.float64, device=theta[0].device)


def _standard_normal(seed_low, seed_high, tensor_id, start, n_elements, distribution, device, backend):
    seed = seed_low | seed_high << 32
    return _module(backend, device).standard_normal(seed, tensor_id, start, n_elements, distribution, device)


_IMPLEMENTATIONS = {
    "perturb_": _perturb,
    "step_": _step,
    "sum_of_squares": _sum_of_squares,
    "standard_normal": _standard_normal,
}
for _name, _impl in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("mezo_kernels::perturb_")
@torch.library.register_fake("mezo_kernels::step_")
def _fake_in_place(*arguments):
    return None


@torch.library.register_fake("mezo_kernels::sum_of_squares")
def _fake_sum(theta, *arguments):
    return theta[0].new_empty((), dtype=torch.float64)


@torch.library.register_fake("mezo_kernels::standard_normal")
def _fake_standard_normal(seed_low, seed_high, tensor_id, start, n_elements, distribution, device, backend):
    return torch.empty(n_elements, dtype=torch.float32, device=device)
