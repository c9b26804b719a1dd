"""`Plan`, `RulePlan` and `Recorded`: the bits of `step_` and `rule_step_`, for a part of their host work."""

import timeit

import pytest
import torch

from mezo_kernels import ParamLayout, Plan, Rule, RulePlan, RuleUpdate, available_backends, rule_step_, step_

numba_step = pytest.importorskip("mezo_kernels.numba.step")
BACKENDS = available_backends("cpu")  # without Triton's interpreter where it does not run
UPDATES = [(2**64 - 1, 0.02, 0.999), (5, -0.5)]


def layouts(n: int = 3000, count: int = 3, dtype: torch.dtype = torch.bfloat16) -> list[ParamLayout]:
    """theta, then two pluses and two minuses of NaN."""
    theta = ParamLayout({f"w{i}": torch.linspace(-1, 1, n + i) for i in range(count)})
    return [theta, *(theta.like([torch.full_like(t, torch.nan, dtype=dtype) for t in theta.tensors]) for _ in range(4))]


def bits(ours: list[ParamLayout]) -> list[list]:
    return [t.view(torch.int32 if t.element_size() == 4 else torch.int16).tolist() for one in ours for t in one.tensors]


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_gives_the_bits_of_step(backend, distribution):
    ours, theirs = layouts(), layouts()
    plan = Plan(ours[0], ours[1:3], ours[3:], distribution=distribution, backend=backend)
    options = {"distribution": distribution, "backend": "reference"}
    for seed in (7, 2**63):
        plan.step_(UPDATES, 0.5, [seed, 9], 1e-3)
        step_(theirs[0], UPDATES, 0.5, [seed, 9], 1e-3, theirs[1:3], theirs[3:], **options)
        assert bits(ours) == bits(theirs)
    plan.step_(UPDATES)
    step_(theirs[0], UPDATES, **options)
    assert bits(ours) == bits(theirs)


def test_one_pair_and_none():
    theta, plus, minus, *_ = layouts()
    expected, *targets = layouts()
    Plan(theta, plus, minus).step_([], next_seed=3, eps=0.1)
    Plan(theta).step_([(4, 0.1)])
    step_(expected, [], 1.0, 3, 0.1, *targets[:2])
    step_(expected, [(4, 0.1)])
    assert bits([theta, plus, minus]) == bits([expected, *targets[:2]])


RULES = [Rule("momentum"), Rule("adam", 0.9, 0.99, 1e-6, l2=0.1), Rule("adamw"), Rule("sign")]
STEPS = [RuleUpdate([2**64 - 1, 5], [0.5, -0.25], lr=0.01, t=1, decay=0.99), RuleUpdate([6], [1.0], lr=0.02, t=2)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_of_a_rule_gives_the_bits_of_rule_step(backend, rule):
    ours, theirs = layouts(count=2), layouts(count=2)
    states = [[own[0].like([torch.zeros_like(t) for t in own[0].tensors]) for _ in range(rule.states)]
              for own in (ours, theirs)]  # fmt: skip
    plan = RulePlan(ours[0], rule, states[0], ours[1:3], ours[3:], backend=backend)
    for updates, seeds in ((STEPS, [7, 9]), (STEPS[:1], [2**63, 1]), (STEPS, None)):
        following = (seeds, 1e-3) if seeds else ()
        plan.step_(updates, *following)
        targets = (*following, theirs[1:3], theirs[3:]) if seeds else ()
        rule_step_(theirs[0], rule, states[1], updates, *targets, backend="reference")
        assert bits([*ours, *states[0]]) == bits([*theirs, *states[1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recorded_step_takes_the_numbers_that_were_set_last(backend):
    ours, theirs = layouts(), layouts()
    step = Plan(ours[0], ours[1:3], ours[3:], backend=backend).recorded(3)
    for updates, decay, seeds, eps in (
        (UPDATES, 0.5, [7, 9], 1e-3),
        ([], 1.0, [2**63, 1], 1e-2),
        ([(3, 0.1)], 1.0, [1, 2], 0.5),
    ):
        step.set(updates, decay, seeds, eps)
        for _ in range(2):
            step.launch()
            step_(theirs[0], updates, decay, seeds, eps, theirs[1:3], theirs[3:], backend="reference")
        assert bits(ours) == bits(theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b, c: Plan(a).recorded(0), "room for an update"),
        (lambda a, b, c: Plan(a).recorded(1).set([(1, 0.1)], 0.5), "at most 1 updates.*got 2 and 0"),
        (lambda a, b, c: Plan(a, b, c).recorded(1).set([(1, 0.1)]), "and 1 seeds, got 1 and 0"),
        (lambda a, b, c: RulePlan(a, Rule("adam"), [], b, c), "keeps 2 layouts of state, got 0"),
        (lambda a, b, c: Plan(a, b, c).step_([], next_seed=[1, 2], eps=0.1), "1 pairs of plus and minus, got 2 seeds"),
        (lambda a, b, c: Plan(a).step_([], next_seed=1, eps=0.1), "0 pairs of plus and minus, got 1 seeds"),
        (lambda a, b, c: Plan(a, b, c).step_([], next_seed=1), "eps must be"),
        (lambda a, b, c: Plan(a, b, c).step_([(1, float("nan"))]), "coefficient must be"),
        (lambda a, b, c: Plan(a, b, b), r"(w\d) shares storage with another parameter \(\1\)"),
        (lambda a, b, c: Plan(a, b), "equal numbers"),
        (lambda a, b, c: Plan(a, backend="cuda"), "backend must be"),
    ],
)
def test_what_a_plan_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(*layouts()[:3])


@pytest.mark.parametrize("way", ["another tensor", "another storage"])
def test_a_tensor_that_moved_is_noticed(way):
    theta, plus, minus, *_ = layouts(n=10, count=20)
    plan, old = Plan(theta, plus, minus), plus.tensors[13].clone()
    if way == "another tensor":
        plus.tensors[13] = old
    else:
        plus.tensors[13].data = old

    def steps():
        for _ in range(8):  # 8 tensors a step, of 60
            plan.step_([], next_seed=1, eps=0.1)

    with pytest.raises(ValueError, match="w13 has moved since the plan was made"):
        steps()


def test_old_storage_stays_alive_until_the_plan_goes():
    theta, *_ = layouts(n=1000, count=1)
    plan, address = Plan(theta), theta.tensors[0].data_ptr()
    theta.tensors[0].data = torch.zeros(1000)
    assert address not in {torch.empty(1000).data_ptr() for _ in range(100)}
    del plan


def test_a_plan_costs_the_host_little(monkeypatch):
    """448 tensors and their copies: without the kernel itself 7 us where `step_` takes 100; half must be saved."""
    theta, plus, minus, *_ = layouts(n=64, count=448)
    monkeypatch.setattr(numba_step, "_step_items", lambda *arguments: None)
    plan, options = Plan(theta, plus, minus), {"next_seed": 7, "eps": 1e-3}
    planned = min(timeit.repeat(lambda: plan.step_([(3, 0.1)], **options), number=20, repeat=20))
    plain = min(
        timeit.repeat(lambda: step_(theta, [(3, 0.1)], **options, plus=plus, minus=minus), number=20, repeat=20)
    )
    assert planned < plain / 2
