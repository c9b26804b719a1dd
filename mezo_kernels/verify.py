"""Checks every backend on this machine against the reference and the frozen vectors of the z stream, bit for bit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mezo_kernels import ops, philox
from mezo_kernels.layout import DTYPES, ParamLayout, ParamSlot

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
# (seed, name, first index, bits of z): version 1 of the z stream
Z_VECTORS = [
    (42, Q_PROJ, 0, "bf84df8e bf39a04d bf191576 bfdb5957"),
    (9223372036854775813, "w", 6, "bf468888 3f2508c5 bc206dec bfb90498"),
    (7, "w", 17179869187, "3f5d4d2d bfac7daa 3f694c1f 3ceaf4d8"),
    (0, "w", 0, "be94eb10 3ea2c2e5 bf5fa60f 3fc4f48d"),
]
RADEMACHER_VECTOR = (42, "w", 0, "3f800000 bf800000 bf800000 3f800000 bf800000 3f800000 3f800000 bf800000")
INIT_VECTOR = (0, Q_PROJ, (8, 576), "3c67e5e0 3cd057bb 3be1dc00 3cdbdeb3")
# (run_seed, step, k, seed)
SEED_VECTORS = [
    (0, 0, 0, 14765902928641365142),
    (0, 1, 0, 1253590578697012336),
    (0, 1, 1, 11884268794979519706),
    (2**64 - 1, 2**32 + 1, 3, 4169657304733001621),
]
UPDATES = [(3, 0.1), (2**64 - 1, -0.2, 0.99), (4, 0.0), (5, 1e-30)]


@dataclass(frozen=True)
class VerifyRow:
    """One check of one backend on one device; `detail` says what differs first, or what was compared."""

    backend: str
    device: str
    check: str
    ok: bool
    detail: str


def verify(device: str | torch.device | None = None) -> list[VerifyRow]:
    """Check every available backend against the reference and the frozen vectors, on this very machine.

    Args:
        device: "cpu" or "cuda"; by default the CPU, and the GPU where there is one.
    Returns:
        One row a check; a backend that raises fails its check. The reference runs on the CPU.

    >>> all(row.ok for row in verify("cpu") if row.backend == "reference")
    True
    """
    devices = ["cpu", "cuda"][: 1 + torch.cuda.is_available()] if device is None else [str(torch.device(device))]
    expected = {name: check("reference", "cpu") for name, check in _comparisons()}
    rows = [_row("reference", "cpu", name, check) for name, check in _host_checks()]
    for where in devices:
        for backend in ops.available_backends(where):
            rows += [_row(backend, where, name, check) for name, check in _vector_checks()]
            if (backend, where) != ("reference", "cpu"):
                rows += [_row(backend, where, name, check, expected[name]) for name, check in _comparisons()]
    return rows


def _row(backend: str, device: str, name: str, check: Callable, expected: dict | None = None) -> VerifyRow:
    """The row of a check that returns what it saw and raises if that is wrong, or returns what is to be `expected`."""
    try:
        seen = check(backend, device)
        return VerifyRow(backend, device, name, True, seen if expected is None else _compare(seen, expected))
    except Exception as error:
        # a kernel that does not compile or run is a finding about this machine, not a bug of this function
        reason = (str(error).splitlines() or [""])[0]
        detail = reason if isinstance(error, _MismatchError) else f"{type(error).__name__}: {reason}"
        return VerifyRow(backend, device, name, False, detail)


class _MismatchError(Exception):
    pass


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _compare(actual: dict, expected: dict) -> str:
    """Tensors bit for bit, sums to 1e-12; raise with the name, index and bits of the first difference."""
    elements = 0
    for name, want in expected.items():
        got = actual[name]
        if isinstance(want, float):
            if not math.isclose(got, want, rel_tol=1e-12):
                raise _MismatchError(f"{name}: {got!r}, expected {want!r}")
            continue
        a, b = _bits(got).flatten(), _bits(want).flatten()
        wrong = (a != b).nonzero().flatten()
        elements += b.numel()
        if len(wrong):
            i = int(wrong[0])
            digits = 2 * want.element_size()
            mask = 16**digits - 1
            raise _MismatchError(
                f"{name}: {len(wrong)} of {b.numel()} elements differ, first at {i}: "
                f"{int(a[i]) & mask:0{digits}x}, expected {int(b[i]) & mask:0{digits}x}"
            )
    return f"{elements} elements equal bit for bit" if elements else "equal to 1e-12"


def _expect(got: str, want: str) -> str:
    if got != want:
        raise _MismatchError(f"{got}, expected {want}")
    return want


def _hex(tensor: torch.Tensor) -> str:
    return " ".join(f"{bits & 0xFFFFFFFF:08x}" for bits in _bits(tensor).flatten().tolist())


def _host_checks() -> Iterator[tuple[str, Callable]]:
    """What only the host computes: the seeds of a run and the initial adapter."""
    for run_seed, step, k, seed in SEED_VECTORS:

        def check(backend, device, position=(run_seed, step, k), want=seed):
            return _expect(str(philox.perturbation_seed(*position)), str(want))

        yield f"seed of run {run_seed}, step {step}, k {k}", check
    run_seed, name, shape, want = INIT_VECTOR
    init = philox.lora_init(run_seed, name, shape, rows=1, cols=4)
    yield "lora_A of run 0", lambda backend, device: _expect(_hex(init), want)


def _vector_checks() -> Iterator[tuple[str, Callable]]:
    """Elements whose bits are part of the definition of z."""
    vectors = [("z", ops.standard_normal, *vector) for vector in Z_VECTORS]
    for label, draw, seed, name, start, want in [*vectors, ("rademacher", ops.rademacher, *RADEMACHER_VECTOR)]:

        def check(backend, device, draw=draw, at=(seed, name, start), want=want):
            return _expect(_hex(draw(*at, len(want.split()), device=device, backend=backend)), want)

        yield f"{label} vector, seed {seed}", check


def _comparisons() -> Iterator[tuple[str, Callable]]:
    """(name, check): each check returns what it computed, by name."""
    yield "standard_normal", lambda backend, device: _runs(ops.standard_normal, backend, device)
    yield "rademacher", lambda backend, device: _runs(ops.rademacher, backend, device)
    for dtype in DTYPES:
        label = str(dtype).removeprefix("torch.")
        yield f"perturb {label}", lambda backend, device, d=dtype: _perturb(backend, device, d, "normal")
        yield f"perturb {label} rademacher", lambda backend, device, d=dtype: _perturb(backend, device, d, "rademacher")
        yield f"step {label}", lambda backend, device, d=dtype: _step(backend, device, d)
    yield "sum_of_squares", _sums


def _runs(draw: Callable, backend: str, device: str) -> dict:
    starts = (0, 1, 2**31 - 2, 2**34 + 3)
    return {f"w[{i}:{i + 3001}]": draw(2**63 + 5, "w", i, 3001, device=device, backend=backend) for i in starts}


def _layout(device: str, dtype: torch.dtype) -> ParamLayout:
    """Storage of every kind: contiguous, sharded by rows and by columns, strided, transposed, far into a parameter."""

    def values(*shape: int) -> torch.Tensor:
        # exact in every dtype, and the same on every machine
        count = torch.arange(math.prod(shape), dtype=torch.float32)
        return (((count * 37) % 256 - 128) / 64).view(shape).to(dtype).to(device)

    return ParamLayout(
        [
            ParamSlot("contiguous", values(4096)),
            ParamSlot("odd", values(3, 343)),
            ParamSlot("row_shard", values(13, 24), (64, 24), 20),
            ParamSlot("column_shard", values(16, 40), (16, 96), 0, 8),
            ParamSlot("column_shard_across_blocks", values(9, 5), (9, 31), 0, 13),
            ParamSlot("padded_rows", values(20, 32)[:, :24]),
            ParamSlot("transposed", values(24, 20).t()),
            ParamSlot("beyond_int32", values(2, 9), (2**20, 2**34), 2**19, 2**33 + 2),
        ]
    )


def _named(**layouts: ParamLayout) -> dict:
    return {f"{label} {n}": t for label, one in layouts.items() for n, t in zip(one.names, one.tensors, strict=True)}


def _perturb(backend: str, device: str, dtype: torch.dtype, distribution: str) -> dict:
    theta = _layout(device, dtype)
    return _named(theta=ops.perturb_(theta, 0.013, 2**63 + 5, distribution=distribution, backend=backend))


def _step(backend: str, device: str, dtype: torch.dtype) -> dict:
    """Several updates of a float32 master, then plus and minus in `dtype`."""
    theta, plus, minus = _layout(device, torch.float32), _layout(device, dtype), _layout(device, dtype)
    ops.step_(theta, UPDATES, 0.9, next_seed=2**63, eps=1e-3, plus=plus, minus=minus, backend=backend)
    return _named(theta=theta, plus=plus, minus=minus)


def _sums(backend: str, device: str) -> dict:
    theta = _layout(device, torch.float32)
    return {d: ops.sum_of_squares(theta, 5, distribution=d, backend=backend) for d in ("normal", "rademacher")}
