"""The table of ops and the table of backends: what is registered with torch.library, who runs it, what checks it.

Everything that must hold for every op reads `OPS`: `verify`, the checks of torch.library, the tests on a GPU, the gate
before benchmarks. A new op is an entry here; a new backend is a folder and an entry in `BACKENDS`.

A backend is an implementation of all ops. An op goes to one of them by name or by device.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mezo_kernels import cases

_LIBRARY = torch.library.Library("mezo_kernels", "DEF")


@dataclass(frozen=True)
class Backend:
    """A set of functions, one an op and of its name, that compute the same bits as `reference`.

    Args:
        module: that has the functions; imported when an op first runs on it.
        unavailable: why it cannot run on a device, or None if it can.
        default_on: type of the devices on which it runs unless another one is asked for; "" for none.
    """

    module: str
    unavailable: Callable[[torch.device], str | None]
    default_on: str = ""


def _no_numba(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it runs on CPU tensors only"


def _no_triton(device: torch.device) -> str | None:
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


BACKENDS: dict[str, Backend] = {
    "reference": Backend("mezo_kernels.reference", lambda device: None),
    "numba": Backend("mezo_kernels.numba", _no_numba, default_on="cpu"),
    "triton": Backend("mezo_kernels.triton", _no_triton, default_on="cuda"),
}


def _nothing(*arguments: Any) -> None:
    """What an op returns that writes in place."""


@dataclass(frozen=True)
class Op:
    """One op, as torch.library knows it.

    Args:
        schema: its signature; the last argument is the backend, or None to choose by device.
        run: (function of a backend, arguments of the schema but for the backend) -> result.
        device: arguments -> where they are.
        cases: device -> (label, arguments but for the backend): storage and values of every kind, made anew.
        fake: arguments -> what torch's tracer sees as the result.
    """

    schema: str
    run: Callable[..., Any]
    device: Callable[..., torch.device]
    cases: Callable[[str], Iterator[tuple[str, tuple]]]
    fake: Callable[..., Any] = _nothing

    def __call__(self, *arguments):
        """Run on the backend that the last argument names."""
        *rest, backend = arguments
        return self.run(_function(self.name, backend, self.device(*rest)), *rest)

    @functools.cached_property
    def name(self) -> str:
        """Of the op, and of its function in every backend."""
        return self.schema.partition("(")[0]


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Names of the backends that run on a device.

    >>> available_backends("cpu")[:2]
    ['reference', 'numba']
    """
    device = torch.device(device)
    return [name for name, backend in BACKENDS.items() if backend.unavailable(device) is None]


def check_backend(name: str | None, device: torch.device) -> None:
    """Raise ValueError if a backend, or the one chosen by device where `name` is None, cannot run there."""
    if name is None:
        if device.type != "meta" and _default(device.type) is None:
            raise ValueError(f"no compiled backend for device {device}; pass backend='reference'")
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if reason := BACKENDS[name].unavailable(device):
        raise ValueError(f"backend {name!r} is not available on {device}: {reason}")


def call(op: str, *arguments: Any) -> Any:
    """An op by torch.library where somebody traces, and directly where nobody does: boxing 448 tensors costs 65 us."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return getattr(torch.ops.mezo_kernels, op)(*arguments)
    return OPS[op](*arguments)


def _default(kind: str) -> str | None:
    """The backend of a type of device, such as "cpu". No cache: torch.compile would warn that it looks past one."""
    for name, backend in BACKENDS.items():
        if backend.default_on == kind:
            return name
    return None


def _module(backend: str | None, device: torch.device):
    name = backend or _default(device.type)
    try:
        return importlib.import_module(BACKENDS[name].module)
    except ModuleNotFoundError as error:
        reason = f"the package {error.name} is not installed; install it, or pass backend='reference'"
        raise ValueError(f"backend {name!r} is not available on {device}: {reason}") from error


def _function(op: str, backend: str | None, device: torch.device) -> Callable:
    return getattr(_module(backend, device), op)


def prepare(op: str, backend: str | None, theta: list[torch.Tensor], *rest: Any) -> Callable[..., None]:
    """An op of a backend as a function of what changes from step to step, on tensors that stay in place.

    A backend may have a function for it (`prepare_step` of `step_`) that looks at the tensors once.

    Args:
        op: its name.
        backend: its name, or None to choose by device.
        theta, rest: the backend's first arguments, all that stay.
    """
    module = _module(backend, theta[0].device)
    function = functools.partial(functools.partial, getattr(module, op))
    return getattr(module, f"prepare_{op.removesuffix('_')}", function)(theta, *rest)


class _Kept:
    """Numbers of a step on the host, for a backend without a buffer of them."""

    def __init__(self, run: Callable, distribution: str):
        self.run, self.distribution = run, distribution

    def write(self, updates: list[tuple], next_seeds: list[int], eps: float) -> None:
        self.numbers = updates, next_seeds, eps

    def launch(self) -> None:
        self.run(*self.numbers, self.distribution)


def buffered(run: Callable, n_updates: int, n_pairs: int, distribution: str) -> Any:
    """A prepared `step_` that takes its numbers from where `write` puts them, and runs at `launch`.

    Args:
        run: of `prepare`; a backend's may have a `buffered` of its own, of the other arguments.
        n_updates, n_pairs: of every step.
        distribution: of z.
    """
    if hasattr(run, "buffered"):
        return run.buffered(n_updates, n_pairs, distribution)
    return _Kept(run, distribution)


def _seeds(words: Sequence[int]) -> list[int]:
    return [low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True)]


def float32(value: float) -> float:
    """A Python float rounded to float32 once, as backends take it."""
    return float(np.float32(value))


def _perturb(function, theta, geometry, scale, seed_low, seed_high, distribution):
    function(theta, geometry, float32(scale), seed_low | seed_high << 32, distribution)


def _step(
    function, theta, plus, minus, geometry, update_seeds, coefficients, decays, next_seeds, eps, distribution
):  # fmt: skip
    updates = in_float32(zip(_seeds(update_seeds), coefficients, decays, strict=True))
    function(theta, plus, minus, geometry, updates, _seeds(next_seeds), float32(eps), distribution)


def in_float32(updates: Iterable[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Updates of `step_` as backends take them: (seed, coefficient, decay), rounded once."""
    return [(seed, float32(coefficient), float32(decay)) for seed, coefficient, decay in updates]


def _rule_step(
    function, theta, state, plus, minus, geometry, kind, constants, update_seeds, numbers, next_seeds, eps, distribution
):  # fmt: skip
    rows = [tuple(map(float32, numbers[i : i + 5])) for i in range(0, len(numbers), 5)]
    updates = [(seed, *row) for seed, row in zip(_seeds(update_seeds), rows, strict=True)]
    constants, next_seeds = [float32(value) for value in constants], _seeds(next_seeds)
    function(theta, state, plus, minus, geometry, kind, constants, updates, next_seeds, float32(eps), distribution)


def _standard_normal(function, seed_low, seed_high, tensor_id, start, n_elements, distribution, device):
    return function(seed_low | seed_high << 32, tensor_id, start, n_elements, distribution, device)


def _fake_standard_normal(seed_low, seed_high, tensor_id, start, n_elements, distribution, device, backend):
    return torch.empty(n_elements, dtype=torch.float32, device=device)


def _of_theta(theta: Sequence[torch.Tensor], *rest) -> torch.device:
    return theta[0].device


OPS: dict[str, Op] = {}
"""Every op by name."""


def register(op: Op, library: torch.library.Library = _LIBRARY) -> None:
    """Make an op known to torch.library and to everything that reads `OPS`.

    Args:
        op: that has no namesake in `OPS`.
        library: that keeps the registration, which ends when the library is destroyed.
    """
    OPS[op.name] = op
    library.define(op.schema)
    library.impl(op.name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mezo_kernels::{op.name}", op.fake, lib=library)


for _op in (
    Op(
        "perturb_(Tensor(a!)[] theta, Tensor[] geometry, float scale, SymInt seed_low, SymInt seed_high,"
        " str distribution, str? backend) -> ()",
        _perturb,
        _of_theta,
        cases.of_perturb,
    ),
    Op(
        "step_(Tensor(a!)[] theta, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor[] geometry, SymInt[] update_seeds,"
        " float[] coefficients, float[] decays, SymInt[] next_seeds, float eps, str distribution, str? backend) -> ()",
        _step,
        _of_theta,
        cases.of_step,
    ),
    Op(
        "rule_step_(Tensor(a!)[] theta, Tensor(b!)[] state, Tensor(c!)[] plus, Tensor(d!)[] minus, Tensor[] geometry,"
        " int kind, float[] constants, SymInt[] update_seeds, float[] numbers, SymInt[] next_seeds, float eps,"
        " str distribution, str? backend) -> ()",
        _rule_step,
        _of_theta,
        cases.of_rule_step,
    ),
    Op(
        "standard_normal(SymInt seed_low, SymInt seed_high, int tensor_id, SymInt start, SymInt n_elements,"
        " str distribution, Device device, str? backend) -> Tensor",
        _standard_normal,
        lambda *arguments: torch.device(arguments[-1]),
        cases.of_standard_normal,
        _fake_standard_normal,
    ),
):
    register(_op)
