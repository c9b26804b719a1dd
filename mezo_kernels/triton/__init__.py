"""The ops as Triton kernels, for CUDA and ROCm: one launch over all parameters, the same bits as the reference."""

from mezo_kernels.triton.perturb import perturb_
from mezo_kernels.triton.rules import rule_step_
from mezo_kernels.triton.standard_normal import standard_normal
from mezo_kernels.triton.step import step_
from mezo_kernels.triton.sum_of_squares import sum_of_squares

__all__ = ["perturb_", "rule_step_", "standard_normal", "step_", "sum_of_squares"]
