"""The ops as Triton kernels, for CUDA and ROCm: one launch over all parameters, the same bits as the reference."""

from mezo_kernels.triton.perturb import perturb_
from mezo_kernels.triton.rules import prepare_rule_step, rule_step_
from mezo_kernels.triton.standard_normal import standard_normal
from mezo_kernels.triton.step import prepare_step, step_

__all__ = ["perturb_", "prepare_rule_step", "prepare_step", "rule_step_", "standard_normal", "step_"]
