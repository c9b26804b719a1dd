"""rule_step_: momentum, AdamW and sign in the pass of the step; the original passes over theta, then torch.optim."""

import pytest
import rows
from providers import EPS, RULES, by_original_and_optim, by_rule
from shapes import make

PROVIDERS = {"ours": by_rule, "original loop, then torch.optim": by_original_and_optim}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", ["lora-r8-qv", "lora-r16-all", "flat-16M"])
@pytest.mark.parametrize("rule", RULES)
def test_rule(benchmark, device, rule, shape, provider):
    case = make(shape, device=device)
    work = PROVIDERS[provider](case, rule)
    baseline = by_original_and_optim(case, rule) if provider == "ours" else None
    nbytes = rows.bytes_of("step", case.elements, case.params[0].dtype) + 8 * case.elements * RULES[rule].states
    facts = {"shape": shape, "tensors": len(case.params), "dtype": "float32", "provider": provider, "rule": rule}
    rows.measure(benchmark, "rule", work, case.elements, nbytes, device, baseline, **facts)
    assert all(p.isfinite().all() and p.abs().max() < 1 + 100 * EPS for p in case.params)
