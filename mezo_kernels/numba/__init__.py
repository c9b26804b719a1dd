"""The ops compiled for CPUs with numba: one call over all parameters, the same bits as the reference."""

from mezo_kernels.numba.rules import prepare_rule_step, rule_step_
from mezo_kernels.numba.step import perturb_, prepare_step, standard_normal, step_

__all__ = ["perturb_", "prepare_rule_step", "prepare_step", "rule_step_", "standard_normal", "step_"]
