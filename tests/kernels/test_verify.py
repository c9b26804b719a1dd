"""`verify` passes here, and fails where a backend is wrong by one bit."""

import importlib
import sys
import types

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels import dispatch, reference

DTYPES = "float32", "bfloat16", "float16", "mixed"
CPU = pytest.importorskip("mezo_kernels.numba")


def failed(rows) -> set[tuple[str, str]]:
    return {(row.backend, row.check) for row in rows if not row.ok}


@pytest.mark.slow  # Triton's interpreter takes 20 s; test_triton.py compares it with the reference, op by op
def test_every_backend_of_this_machine_is_right():
    rows = mk.verify()
    assert failed(rows) == set()
    assert {row.backend for row in rows} >= {"reference", "numba", *mk.available_backends("cpu")}
    checks = {row.check for row in rows if row.backend == "numba"}
    assert {check.split()[0] for check in checks} >= set(dispatch.OPS)
    for dtype in DTYPES:
        assert {f"perturb_ {dtype} normal", f"step_ {dtype}"} <= checks


@pytest.fixture
def numba_rows(monkeypatch):
    """Rows of the numba backend alone: the others take seconds in an interpreter, and are not broken here."""
    monkeypatch.setattr(dispatch, "available_backends", lambda device: ["numba"])
    return lambda: mk.verify("cpu")


def test_a_backend_that_is_right_passes(numba_rows):
    rows = numba_rows()
    assert failed(rows) == set()
    assert {row.backend for row in rows} == {"reference", "numba"}


def flip_last_bit(tensor: torch.Tensor, index: int) -> None:
    bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    bits[index] ^= 1


def test_one_bit_of_a_perturbation(monkeypatch, numba_rows):
    right = CPU.perturb_

    def wrong(theta, *arguments):
        right(theta, *arguments)
        if theta[0].dtype == torch.bfloat16:
            flip_last_bit(theta[0], 4095)

    monkeypatch.setattr(CPU, "perturb_", wrong)
    rows = numba_rows()
    checks = {f"perturb_ bfloat16 {kind}" for kind in ("normal", "rademacher")}
    assert failed(rows) == {("numba", check + more) for check in checks for more in ("", " aligned")}
    detail = next(row.detail for row in rows if not row.ok)
    assert "theta[0]: 1 of 4096 elements differ, first at 4095" in detail


def test_one_bit_of_a_step(monkeypatch, numba_rows):
    right = CPU.step_

    def wrong(theta, plus, minus, *arguments):
        right(theta, plus, minus, *arguments)
        if minus:
            flip_last_bit(minus[-1][0], 3)

    monkeypatch.setattr(CPU, "step_", wrong)
    assert failed(numba_rows()) == {("numba", f"step_ {d}{more}") for d in DTYPES for more in ("", " aligned")}


def test_one_bit_of_z(monkeypatch, numba_rows):
    right = CPU.standard_normal

    def wrong(*arguments):
        z = right(*arguments)
        flip_last_bit(z, 3)
        return z

    monkeypatch.setattr(CPU, "standard_normal", wrong)
    checks = {check for backend, check in failed(numba_rows()) if backend == "numba"}
    assert {"z vector, seed 42 from 0", "z vector, seed 0 from 0", "rademacher vector, seed 42 from 0"} <= checks
    assert "standard_normal normal from 0" in checks


def test_one_bit_of_a_moment(monkeypatch, numba_rows):
    """Rules with state are looked at too, and their state as well as theta."""
    right = CPU.rule_step_

    def wrong(theta, state, *arguments):
        right(theta, state, *arguments)
        if len(state) == 2 * len(theta):
            flip_last_bit(state[-1][0], 3)

    monkeypatch.setattr(CPU, "rule_step_", wrong)
    cases = "adam mixed", "adam float32 aligned", "adamw float16", "adamw mixed aligned"
    assert failed(numba_rows()) == {("numba", f"rule_step_ {case}") for case in cases}


def test_an_element_that_is_not_written(monkeypatch, numba_rows):
    """plus and minus are NaN at first, and NaN fails: also where the reference leaves out the same element."""

    def leave_one_out(right):
        def wrong(theta, plus, *arguments):
            right(theta, plus, *arguments)
            if len(theta) > 5:
                plus[5][7, 3] = torch.nan

        return wrong

    for backend in (CPU, reference):
        monkeypatch.setattr(backend, "step_", leave_one_out(backend.step_))
    rows = [row for row in numba_rows() if not row.ok]
    assert {row.check for row in rows} == {f"step_ {d}" for d in DTYPES}
    assert {row.detail for row in rows} == {"plus[5]: 1 of 480 elements are NaN, first at 171"}


def test_a_toy_backend_is_a_module_and_an_entry(monkeypatch):
    """It is checked, and taken by name, as soon as the table has it."""
    module = types.ModuleType("toy_backend")
    vars(module).update({name: getattr(reference, name) for name in dispatch.OPS})
    module.perturb_ = lambda *arguments: None  # does nothing, which is wrong
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    monkeypatch.setitem(dispatch.BACKENDS, "toy", dispatch.Backend("toy_backend", lambda device: None))
    monkeypatch.setattr(dispatch, "available_backends", lambda device: ["toy"])  # the others take seconds
    rows = [row for row in mk.verify("cpu") if row.backend == "toy"]
    assert {row.check.split()[0] for row in rows if not row.ok} == {"perturb_"}
    assert {row.check.split()[0] for row in rows if row.ok} >= {"step_", "rule_step_", "standard_normal"}
    w = torch.zeros(4)
    mk.step_(mk.ParamLayout({"w": w}), [(0, 1.0)], backend="toy")
    assert torch.equal(w, -mk.standard_normal(0, "w", 0, 4))


def test_every_backend_has_every_op():
    for name in mk.available_backends("cpu"):
        module = importlib.import_module(dispatch.BACKENDS[name].module)
        assert all(callable(getattr(module, op)) for op in dispatch.OPS), name


def test_a_backend_that_raises_fails_its_checks(monkeypatch, numba_rows):
    def broken(*arguments):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(CPU, "perturb_", broken)
    rows = [row for row in numba_rows() if not row.ok]
    assert {row.check.split()[0] for row in rows} == {"perturb_"}
    assert rows[0].detail == "RuntimeError: no kernel image is available"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_every_backend_of_the_gpu_is_right():
    rows = mk.verify("cuda")
    assert failed(rows) == set()
    assert {row.backend for row in rows} >= {"reference", "triton"}
