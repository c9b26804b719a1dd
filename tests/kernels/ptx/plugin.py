"""Loaded by pytest (`-p`): the backend `triton` runs its compiled kernels on the CPU, for the GPU named by MEZO_PTX."""

import os

from mezo_kernels.ptx import emulated

_open = emulated(os.environ["MEZO_PTX"])  # kept, or it would be closed
_open.__enter__()
