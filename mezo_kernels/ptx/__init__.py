"""Compiled kernels on a CPU: the PTX that Triton makes of them for NVIDIA's GPUs, run instruction by instruction.

This shows what the compiler made: its layouts, alignments, masks, addresses, exchanges and conversions, to the bit. It
shows nothing of ptxas, which makes machine code of PTX, nor of a GPU's own memory model, launches and speed.
"""

from mezo_kernels.ptx.device import TARGETS, emulated

__all__ = ["TARGETS", "emulated"]
