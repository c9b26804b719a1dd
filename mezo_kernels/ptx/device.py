"""A device that runs compiled kernels on the CPU: Triton compiles to PTX for it and launches, and `Machine` runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from mezo_kernels import dispatch
from mezo_kernels.ptx.machine import Machine
from mezo_kernels.ptx.memory import Global
from mezo_kernels.ptx.program import parse

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


class _Compiler(CUDABackend):
    """Triton's compiler for NVIDIA up to PTX, which is what this device loads."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict, options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


class Device:
    """What Triton asks a driver for, and what it does with a kernel.

    Args:
        target: one of `TARGETS`.
        edit: what becomes of a kernel's PTX before it is run; tests break it here.
    """

    def __init__(self, target: str, edit: Callable[[str], str] = str):
        self.target, self.edit = GPUTarget("cuda", TARGETS[target], 32), edit
        self.tensors: list[torch.Tensor] = []
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 1}
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: properties, unload_module=lambda module: None
        )

    def get_current_device(self) -> tuple:
        """Names the cache of compiled kernels: nobody else's, since an edited kernel must not outlive its device."""
        return "ptx", id(self)

    def get_current_stream(self, device: Any) -> int:
        """There is one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return self.target

    def _load(self, name: str, ptx: str | bytes, shared: int, device: Any) -> tuple:
        text = ptx.decode() if isinstance(ptx, bytes) else ptx
        program = parse(self.edit(text), shared)
        return program, program, 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        """A function that Triton calls with a grid and the kernel's arguments."""
        kinds = list(source.signature.values())

        def launch(grid, grid_y, grid_z, stream, program, packed, launch_metadata, enter, leave, *arguments):
            given = [(kind, value) for kind, value in zip(kinds, arguments, strict=True) if kind != "constexpr"]
            tensors = [value for _, value in given if isinstance(value, torch.Tensor)]
            memory = Global([*self.tensors, *tensors])
            # after the kernel's own parameters come two pointers to scratch memory, which it does not ask for
            parameters = [_bits(kind, value) for kind, value in given] + 2 * [np.zeros(1, np.uint64)]
            Machine(program, grid, parameters, memory).run()
            memory.write_back()

        return launch


def _bits(kind: str, value: Any) -> np.ndarray:
    """A kernel's argument as an array of one unsigned number."""
    if isinstance(value, torch.Tensor):
        return np.array([value.data_ptr()], np.uint64)
    numbers = {"fp32": np.float32, "i32": np.int32, "i64": np.int64}
    value = np.array([value], numbers[kind])
    return value.view(f"u{value.itemsize}")


@contextmanager
def emulated(target: str = "sm_90", edit: Callable[[str], str] = str) -> Iterator[Device]:
    """Let the backend `triton` run what Triton compiles for a GPU, on CPU tensors and without a GPU.

    Args:
        target: "sm_80", "sm_90" or "sm_100".
        edit: what becomes of a kernel's PTX before it is run.
    Raises:
        ValueError: another target, or Triton's interpreter was chosen in this process.
    """
    if target not in TARGETS:
        raise ValueError(f"expected one of {', '.join(TARGETS)}, got {target!r}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 interprets kernels in place of compiling them; unset it")
    device, backend = Device(target, edit), dispatch.BACKENDS["triton"]
    active, compiler = driver._active, backends["nvidia"]
    driver.set_active(device)
    backends["nvidia"] = replace(compiler, compiler=_Compiler)
    dispatch.BACKENDS["triton"] = replace(backend, module="mezo_kernels.ptx.ops", unavailable=lambda device: None)
    try:
        yield device
    finally:
        driver._active, backends["nvidia"], dispatch.BACKENDS["triton"] = active, compiler, backend
