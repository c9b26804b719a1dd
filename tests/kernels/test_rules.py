"""Update rules with state: every backend is the reference to the bit, and the reference is the formula."""

import math

import pytest
import torch

from mezo_kernels import (
    ParamLayout,
    ParamSlot,
    Rule,
    RulePlan,
    RuleUpdate,
    available_backends,
    rule_step_,
    standard_normal,
)
from tests.kernels.test_triton import assert_same_bits, layout, shapes, unwritten

RULES = {
    "momentum": Rule("momentum", beta1=0.9),
    "adam": Rule("adam", 0.9, 0.99, 1e-6, l2=0.1),
    "adamw": Rule("adamw", 0.8, 0.999),
    "sign": Rule("sign"),
}
UPDATES = [
    RuleUpdate([2**64 - 1], [-0.5], 0.01, 1, 0.999),
    RuleUpdate([5, 6, 7], [0.3, 0.0, -2.0], 0.02, 2),
    RuleUpdate([8], [1e-20], 1e-3, 3, 0.5),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILED = [
    "numba",
    pytest.param("triton", marks=pytest.mark.skipif("triton" not in available_backends("cpu"), reason="no Triton")),
]
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def zeros(theta, rule):
    return [theta.like([torch.zeros_like(t, memory_format=torch.contiguous_format) for t in theta.tensors])
            for _ in range(rule.states)]  # fmt: skip


def run(slots, rule, updates, backend, dtypes=(), distribution="normal", passes=1):
    """All that is written: theta, state, plus and minus of every pair."""
    theta = layout(slots, torch.float32, "cpu")
    state = zeros(theta, rule)
    targets = [unwritten(slots, dtype, "cpu") for dtype in dtypes for _ in "+-"]
    pairs = {}
    if targets:
        seeds = list(range(90, 90 + len(dtypes)))
        pairs = {"next_seed": seeds, "eps": 1e-2, "plus": targets[::2], "minus": targets[1::2]}
    size = len(updates) // passes
    for i in range(passes):
        last = pairs if i == passes - 1 else {}
        part = updates[i * size : (i + 1) * size]
        rule_step_(theta, rule, state, part, **last, distribution=distribution, backend=backend)
    return [theta, *state, *targets]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        *((kind, [torch.bfloat16]) for kind in RULES),
        # pairs are stored alike by all rules; where they stand in the table depends on the number of states
        ("adam", []),
        ("adam", [torch.float32]),
        *((kind, DTYPES) for kind in ("momentum", "adam", "sign")),
    ],
    ids=str,
)
def test_backends_are_the_reference(kind, dtypes, backend):
    """In every kind of storage and shard, with several perturbations in a step and several pairs after it."""
    slots, rule = shapes(1027), RULES[kind]
    assert_same_bits(run(slots, rule, UPDATES, backend, dtypes), run(slots, rule, UPDATES, "reference", dtypes))


@each_rule
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("size", [1, 3, 1024, 5000])
def test_rademacher_and_sizes(rule, backend, size):
    slots = [ParamSlot("w", torch.linspace(-3, 3, size))]
    got, want = (run(slots, rule, UPDATES, b, [torch.bfloat16], "rademacher") for b in (backend, "reference"))
    assert_same_bits(got, want)


@each_rule
@pytest.mark.parametrize("backend", ["reference", *COMPILED])
def test_a_pass_of_many_updates_is_as_many_passes(rule, backend):
    slots = shapes(300)[:4]
    assert_same_bits(run(slots, rule, UPDATES, backend), run(slots, rule, UPDATES, backend, passes=3))


@each_rule
def test_a_shard_gets_its_slice(rule):
    whole, part = torch.linspace(-1, 1, 480).view(12, 40), slice(3, 9)
    full = run([ParamSlot("w", whole)], rule, UPDATES, None)
    shard = run([ParamSlot("w", whole[part, 10:30].contiguous(), (12, 40), 3, 10)], rule, UPDATES, None)
    for a, b in zip(full, shard, strict=True):
        assert torch.equal(a.tensors[0][part, 10:30], b.tensors[0])


@each_rule
def test_flipped_losses_flip_the_update(rule):
    """Without decay the move from zero of -g is minus that of g, exactly."""
    slots = [ParamSlot("w", torch.zeros(500))]
    rule = Rule(rule.kind, rule.beta1, rule.beta2, rule.eps)
    moved = []
    for sign in (1, -1):
        updates = [RuleUpdate([seed], [sign * w], 0.01, seed) for seed, w in ((1, 0.5), (2, -0.7))]
        moved.append(run(slots, rule, updates, None)[0].tensors[0])
    assert torch.equal(moved[0], -moved[1])
    assert moved[0].abs().max() > 0


@pytest.mark.parametrize(("kind", "grows"), [("momentum", 4), ("adam", 1), ("adamw", 1), ("sign", 1)])
def test_scale_of_the_loss(kind, grows):
    """Momentum moves four times as far for four times the loss; Adam (but for eps) and sign do not."""
    slots = [ParamSlot("w", torch.zeros(500))]
    rule, moved = Rule(kind, eps=1e-30), []
    for scale in (1, 4):
        updates = [RuleUpdate([seed], [scale * w], 0.01, seed) for seed, w in ((1, 0.5), (2, -0.7))]
        moved.append(run(slots, rule, updates, None)[0].tensors[0])
    assert torch.equal(moved[1], grows * moved[0])


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_torch_s_own_optimizers_agree(kind, weight_decay):
    """Their arithmetic rounds elsewhere, so to 1e-5; the gradient they are given is sum_k w_k z_k."""
    start, lr = torch.linspace(-2, 2, 200), 0.01
    theirs = torch.nn.Parameter(start.clone())
    options = {"lr": lr, "weight_decay": weight_decay}
    make = {
        "momentum": lambda: torch.optim.SGD([theirs], lr=lr, momentum=0.9),
        "adam": lambda: torch.optim.Adam([theirs], betas=(0.9, 0.99), **options),
        "adamw": lambda: torch.optim.AdamW([theirs], betas=(0.9, 0.99), **options),
    }
    optimizer = make[kind]()
    decay = 1.0 if kind == "adam" else 1 - lr * weight_decay
    rule = Rule(kind, 0.9, 0.99, l2=weight_decay if kind == "adam" else 0.0)
    updates = [RuleUpdate([2 * t, 2 * t + 1], [0.3 * t, -0.2], lr, t, decay) for t in range(1, 21)]
    for update in updates:
        z = [standard_normal(seed, "w", 0, 200) for seed in update.seeds]
        theirs.grad = sum(w * direction for w, direction in zip(update.weights, z, strict=True))
        if kind == "momentum":  # torch's own decay would enter the buffer
            theirs.data *= decay
        optimizer.step()
    ours = run([ParamSlot("w", start)], rule, updates, None)[0].tensors[0]
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_several_perturbations_are_one_update():
    """Adam acts once on the mean estimate: not what it would do once for each perturbation."""
    slots, rule = [ParamSlot("w", torch.zeros(100))], Rule("adam")
    once = run(slots, rule, [RuleUpdate([1, 2], [0.5, 0.5], 0.01, 1)], None)
    each = run(slots, rule, [RuleUpdate([1], [0.5], 0.01, 1), RuleUpdate([2], [0.5], 0.01, 2)], None)
    mean = sum(0.5 * standard_normal(seed, "w", 0, 100) for seed in (1, 2))
    torch.testing.assert_close(once[1].tensors[0], 0.1 * mean)
    assert not torch.equal(once[0].tensors[0], each[0].tensors[0])


@pytest.mark.parametrize("kind", RULES)
def test_descends_a_quadratic(kind):
    """|theta - target|**2 from central differences falls to a twentieth."""
    theta, target = torch.full((20,), 3.0), torch.linspace(-1, 1, 20)
    one, rule = ParamLayout({"w": theta}), Rule(kind)
    state = zeros(one, rule)
    lr = {"momentum": 0.002}.get(kind, 0.2)
    start = (theta - target).square().sum().item()
    for t in range(1, 401):
        z = standard_normal(t, "w", 0, 20)
        slope = 2 * (z @ (theta - target)).item()
        rule_step_(one, rule, state, [RuleUpdate([t], [slope], lr * (1 - t / 401), t)])
    assert (theta - target).square().sum().item() < 0.05 * start
    assert math.isfinite(theta.sum().item())


def state_as_plus(call):
    """The next plus would be written over the moments."""
    theta, m, minus = (ParamLayout({"w": torch.ones(2)}) for _ in range(3))
    arguments = {"updates": [], "next_seed": 1, "eps": 0.1} if call is rule_step_ else {}
    call(theta, RULES["momentum"], [m], plus=m, minus=minus, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("rmsprop"), "kind of rule must be one of momentum, adam, adamw, sign; got 'rmsprop'"),
        (lambda: Rule("adam", beta1=1.0), "beta1 of rule must be in"),
        (lambda: Rule("adam", eps=0.0), "eps of rule must be a finite float32 number > 0"),
        (lambda: Rule("adamw", l2=0.1), "l2 is of the rule adam"),
        (lambda: run([ParamSlot("w", torch.ones(2))], RULES["adam"], [RuleUpdate([1], [], 0.1, 1)], None), "a weight"),
        (lambda: run([ParamSlot("w", torch.ones(2))], RULES["adam"], [RuleUpdate([1], [1.0], 0.1, 0)], None), "from 1"),
        (lambda: rule_step_(ParamLayout({"w": torch.ones(2)}), RULES["adam"], [], []), "keeps 2 layouts of state"),
        (
            lambda: rule_step_(ParamLayout({"w": torch.ones(2).half()}), RULES["sign"], [], []),
            "needs a float32 master and state, got torch.float16",
        ),
        (lambda: state_as_plus(rule_step_), r"w shares storage with another parameter \(w\)"),
        (lambda: state_as_plus(RulePlan), r"w shares storage with another parameter \(w\)"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
