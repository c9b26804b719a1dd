"""Loaded by pytest (`-p`): the backend `triton` runs its compiled kernels on the CPU, for the GPU named by MEZO_PTX."""

import contextlib
import os

from mezo_kernels.ptx import emulated


def pytest_configure(config):
    """For as long as pytest runs."""
    stack = contextlib.ExitStack()
    stack.enter_context(emulated(os.environ["MEZO_PTX"]))
    config.add_cleanup(stack.close)
