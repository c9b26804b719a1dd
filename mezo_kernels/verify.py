"""Checks every backend on this machine against the reference and the frozen vectors of the z stream, bit for bit."""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mezo_kernels import dispatch, ops, philox

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
# (seed, name, first index, bits of z): version 1 of the z stream
Z_VECTORS = [
    (42, Q_PROJ, 0, "bf84df8e bf39a04d bf191576 bfdb5957"),
    (9223372036854775813, "w", 6, "bf468888 3f2508c5 bc206dec bfb90498"),
    (7, "w", 17179869187, "3f5d4d2d bfac7daa 3f694c1f 3ceaf4d8"),
    (0, "w", 0, "be94eb10 3ea2c2e5 bf5fa60f 3fc4f48d"),
    (0, "w", 19962192, "3fc50493 40029c30 80000000 00000000"),  # a word that becomes u = 1: the radius is -0
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


@dataclass(frozen=True)
class VerifyRow:
    """One check of one backend on one device; `detail` says what differs first, or what was compared."""

    backend: str
    device: str
    check: str
    ok: bool
    detail: str


def verify(device: str | torch.device | None = None, compiled: str | None = None) -> list[VerifyRow]:
    """Check every available backend against the reference and the frozen vectors, on this very machine.

    Args:
        device: "cpu" or "cuda"; by default the CPU, and the GPU where there is one.
        compiled: a GPU of `mezo_kernels.ptx.TARGETS`, such as "sm_90", which need not be here: check in place of this
            machine's backends the code that Triton compiles for it, run on the CPU. Takes a minute at first.
    Returns:
        One row a check; a backend that raises fails its check. The reference runs on the CPU.
    Raises:
        ValueError: `compiled` beside `device`, or not one of the targets; Triton is missing or interprets.

    >>> all(row.ok for row in verify("cpu"))  # doctest: +SKIP
    True
    """
    if compiled is not None:
        return _verify_compiled(compiled, device)
    devices = ["cpu", "cuda"][: 1 + torch.cuda.is_available()] if device is None else [str(torch.device(device))]
    expected = {name: check("reference", "cpu") for name, check in _comparisons()}
    rows = [_row("reference", "cpu", name, check) for name, check in _host_checks()]
    for where in devices:
        for backend in dispatch.available_backends(where):
            rows += [_row(backend, where, name, check) for name, check in _vector_checks()]
            if (backend, where) != ("reference", "cpu"):
                rows += [_row(backend, where, name, check, expected[name]) for name, check in _comparisons()]
    return rows


def _verify_compiled(target: str, device: str | torch.device | None) -> list[VerifyRow]:
    if device is not None:
        raise ValueError(f"compiled code runs on the CPU; leave out the device, got {device}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("compiled code needs the package triton, which is not installed")
    from mezo_kernels.ptx import emulated

    expected = {name: check("reference", "cpu") for name, check in _comparisons()}
    with emulated(target):
        rows = [_row("triton", "cpu", name, check) for name, check in _vector_checks()]
        rows += [_row("triton", "cpu", name, check, expected[name]) for name, check in _comparisons()]
    return [replace(row, device=target) for row in rows]


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
    """Tensors bit for bit; raise with the name, index and bits of the first difference, or of the first NaN.

    No case computes a NaN. What an op must write is NaN at first, so one that is left was not written, and that is
    wrong even where the reference left it too.
    """
    elements = 0
    for name, want in expected.items():
        a, b = _bits(actual[name]).flatten(), _bits(want).flatten()
        unwritten = actual[name].flatten().isnan().nonzero().flatten()
        if len(unwritten):
            raise _MismatchError(f"{name}: {len(unwritten)} of {b.numel()} elements are NaN, first at {unwritten[0]}")
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
    return f"{elements} elements equal bit for bit"


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

        yield f"{label} vector, seed {seed} from {start}", check


def _comparisons() -> Iterator[tuple[str, Callable]]:
    """(name, check) of every case of every op; a check returns the tensors that the op read and wrote, by name."""
    for op in dispatch.OPS.values():
        for i, (label, _) in enumerate(op.cases("cpu")):

            def check(backend, device, op=op, i=i):
                _, arguments = next(itertools.islice(op.cases(device), i, None))
                result = op(*arguments, backend)
                return dict(_tensors(op.schema, (*arguments, result)))

            yield f"{op.name} {label}", check


def _tensors(schema: str, values: Sequence) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the arguments that an op reads or writes, and of its result."""
    names = re.findall(r"(\w+)(?:,|\))", schema.partition(" -> ")[0])
    for name, value in zip([*names[:-1], "result"], values, strict=True):
        if name == "geometry":
            continue
        for k, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, torch.Tensor):
                yield (f"{name}[{k}]" if isinstance(value, list) else name), tensor
