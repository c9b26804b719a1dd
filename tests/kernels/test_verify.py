"""`verify` passes here, and fails where a backend is wrong by one bit."""

import importlib

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels import ops

CPU = importlib.import_module("mezo_kernels.cpu")


def failed(rows) -> set[tuple[str, str]]:
    return {(row.backend, row.check) for row in rows if not row.ok}


def test_every_backend_of_this_machine_is_right():
    rows = mk.verify()
    assert failed(rows) == set()
    assert {row.backend for row in rows} >= {"reference", "numba", *mk.available_backends("cpu")}
    checks = {row.check for row in rows if row.backend == "numba"}
    for op in ("perturb", "step"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert f"{op} {dtype}" in checks


@pytest.fixture
def numba_rows(monkeypatch):
    """Rows of the numba backend alone: the others take seconds in an interpreter, and are not broken here."""
    monkeypatch.setattr(ops, "available_backends", lambda device: ["numba"])
    return lambda: mk.verify("cpu")


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
    assert failed(rows) == {("numba", "perturb bfloat16"), ("numba", "perturb bfloat16 rademacher")}
    detail = next(row.detail for row in rows if not row.ok)
    assert "theta contiguous: 1 of 4096 elements differ, first at 4095" in detail


def test_one_bit_of_a_step(monkeypatch, numba_rows):
    right = CPU.step_

    def wrong(theta, plus, minus, *arguments):
        right(theta, plus, minus, *arguments)
        flip_last_bit(minus[-1][0], 3)

    monkeypatch.setattr(CPU, "step_", wrong)
    assert failed(numba_rows()) == {("numba", f"step {d}") for d in ("float32", "bfloat16", "float16")}


def test_one_bit_of_z(monkeypatch, numba_rows):
    right = CPU.standard_normal

    def wrong(*arguments):
        z = right(*arguments)
        flip_last_bit(z, 3)
        return z

    monkeypatch.setattr(CPU, "standard_normal", wrong)
    checks = {check for backend, check in failed(numba_rows()) if backend == "numba"}
    assert {"z vector, seed 42", "z vector, seed 0", "rademacher vector, seed 42", "standard_normal"} <= checks


def test_a_sum_off_by_a_rounding_of_float32(monkeypatch, numba_rows):
    right = CPU.sum_of_squares
    monkeypatch.setattr(CPU, "sum_of_squares", lambda *arguments: right(*arguments) * (1 + 1e-8))
    assert failed(numba_rows()) == {("numba", "sum_of_squares")}


def test_a_backend_that_raises_fails_its_checks(monkeypatch, numba_rows):
    def broken(*arguments):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(CPU, "perturb_", broken)
    rows = [row for row in numba_rows() if not row.ok]
    assert len(rows) == 6
    assert rows[0].detail == "RuntimeError: no kernel image is available"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_every_backend_of_the_gpu_is_right():
    rows = mk.verify("cuda")
    assert failed(rows) == set()
    assert {row.backend for row in rows} >= {"reference", "triton"}
