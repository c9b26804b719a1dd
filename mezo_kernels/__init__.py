"""Fused zeroth-order parameter ops: z is regenerated from a counter, never stored, and the same bits everywhere."""

from mezo_kernels.anchored import anchored_decay_
from mezo_kernels.dispatch import available_backends
from mezo_kernels.layout import ParamLayout, ParamSlot, canonical_name
from mezo_kernels.ops import perturb_, rademacher, rule_step_, standard_normal, step_
from mezo_kernels.philox import Z_STREAM_VERSION, lora_init, perturbation_seed, tensor_id
from mezo_kernels.plan import Plan, Recorded, RulePlan
from mezo_kernels.products import inner_products
from mezo_kernels.rms import root_mean_square
from mezo_kernels.rules import Rule, RuleUpdate
from mezo_kernels.verify import VerifyRow, verify

__all__ = [
    "Z_STREAM_VERSION",
    "ParamLayout",
    "ParamSlot",
    "Plan",
    "Recorded",
    "Rule",
    "RulePlan",
    "RuleUpdate",
    "VerifyRow",
    "anchored_decay_",
    "available_backends",
    "canonical_name",
    "inner_products",
    "lora_init",
    "perturb_",
    "perturbation_seed",
    "rademacher",
    "root_mean_square",
    "rule_step_",
    "standard_normal",
    "step_",
    "tensor_id",
    "verify",
]
