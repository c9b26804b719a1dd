"""The optimizer: its maths on functions with known derivatives, and everything it promises to the bit."""

import copy
import math
import statistics

import pytest
import torch

from mezo import MeZO
from mezo.method.rules import RULES
from mezo_kernels import (
    ParamLayout,
    Rule,
    RuleUpdate,
    perturb_,
    perturbation_seed,
    rademacher,
    rule_step_,
    standard_normal,
    step_,
)

# the truncation error of a central difference of a smooth loss at eps 1e-2, and float32 rounding over 2 eps
DERIVATIVE_TOLERANCE = 2e-3


def bits(tensor):
    return tensor.detach().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).clone()


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)


def make_closure(model):
    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    return lambda: torch.nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)).float(), y)


def train(model, optimizer, steps):
    closure = make_closure(model)
    return [optimizer.step(closure).item() for _ in range(steps)]


def theta_of(model):
    return [bits(p) for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "momentum", "lr": 0.002},
        {"rule": "conservative", "lr": 0.02},
        {"normalise_z": True},
        {"num_perturbations": 4},
        {"distribution": "rademacher"},
        {"rule": "adam", "lr": 0.1},
        {"rule": "adamw", "lr": 0.1, "num_perturbations": 2},
        {"rule": "sign", "lr": 0.05},
        {"rule": "fzoo", "lr": 3e-5, "num_perturbations": 4},
        {"rule": "guided", "lr": 0.01, "num_perturbations": 4},
        {"rule": "subspace-adam", "lr": 0.05, "num_perturbations": 4, "refresh_every": 10},
    ],
)
def test_descends_a_quadratic(options):
    """A sign error in the estimate or in the update would climb."""
    theta = torch.full((20,), 3.0)
    target = torch.linspace(-1, 1, 20)
    optimizer = MeZO([theta], **{"lr": 0.02, **options})
    start = (theta - target).square().sum().item()
    for _ in range(400):
        optimizer.step(lambda: (theta - target).square().sum())
    assert (theta - target).square().sum().item() < 0.05 * start


def test_projected_grad_is_the_directional_derivative():
    model = make_model()
    make_closure(model)().backward()
    z = [torch.zeros_like(p) for p in model.parameters()]
    perturb_(ParamLayout(dict(zip(dict(model.named_parameters()), z, strict=True))), 1.0, perturbation_seed(3, 0))
    expected = sum((p.grad * d).sum().item() for p, d in zip(model.parameters(), z, strict=True))
    optimizer = MeZO(model.named_parameters(), lr=0.0, eps=1e-2, seed=3)
    train(model, optimizer, 1)
    assert optimizer.projected_grads == pytest.approx([expected], abs=DERIVATIVE_TOLERANCE)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw", "sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_is_the_formula_of_the_z_stream(dtype, rule):
    """Rebuild two steps from the logged projected_grads alone, with the reference backend."""
    model = make_model(dtype)
    lr, wd, n = 0.05, 0.1, 2
    layout = ParamLayout({name: p.detach().float().clone() for name, p in model.named_parameters()})
    fused = None if rule == "sgd" else Rule(rule, l2=wd if rule == "adam" else 0.0)
    state = [layout.like([torch.zeros_like(t) for t in layout.tensors]) for _ in range(fused.states if fused else 0)]
    options = {"lr": lr, "weight_decay": wd, "num_perturbations": n, "seed": 5}
    optimizer = MeZO(model.named_parameters(), rule=rule, **options)
    for step in range(2):
        train(model, optimizer, 1)
        seeds = [perturbation_seed(5, step, k) for k in range(n)]
        if fused:
            decay = 1.0 if rule == "adam" else 1 - lr * wd
            update = RuleUpdate(seeds, [g / n for g in optimizer.projected_grads], lr, step + 1, decay)
            rule_step_(layout, fused, state, [update], backend="reference")
        else:
            updates = [(s, lr * g / n) for s, g in zip(seeds, optimizer.projected_grads, strict=True)]
            step_(layout, updates, 1 - lr * wd, backend="reference")
    assert same([bits(theta.to(dtype)) for theta in layout.tensors], theta_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_closure_sees_single_roundings_of_the_perturbed_master(dtype):
    theta = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, master, seen = bits(theta), theta.float(), []
    optimizer = MeZO([theta], lr=0.0, eps=1e-2, seed=9)

    def closure():
        seen.append(bits(theta))
        return theta.float().sum()

    optimizer.step(closure)
    z = torch.zeros(1000)
    perturb_(ParamLayout({"0": z}), 1.0, perturbation_seed(9, 0))
    eps = torch.tensor(1e-2)
    assert same(seen, [bits((master + eps * z).to(dtype)), bits((master - eps * z).to(dtype))])
    assert torch.equal(bits(theta), before)


def test_fzoo_is_the_estimate_of_theory_over_the_deviation_of_its_losses():
    """One-sided along z = +1 or -1, n + 1 calls of which the first sees theta, from one generator state."""
    theta, seen, draws, n, lr, eps = torch.linspace(-1, 1, 50), [], [], 3, 1e-3, 1e-2
    before, target = theta.clone(), torch.linspace(1, 2, 50)
    loss = lambda at: (at - target).square().sum()  # noqa: E731

    def closure():
        seen.append(theta.clone())
        draws.append(torch.rand(1).item())
        return loss(theta)

    optimizer = MeZO([("w", theta)], lr=lr, eps=eps, rule="fzoo", num_perturbations=n, weight_decay=0.5, seed=4)
    mean = optimizer.step(closure)
    assert optimizer.distribution == "rademacher"
    assert len(set(draws)) == 1
    assert len(seen) == n + 1
    assert torch.equal(seen[0], before)
    assert all(((copy - before).abs() - eps).abs().max() < 1e-7 for copy in seen[1:])
    z = [rademacher(perturbation_seed(4, 0, k), "w", 0, 50) for k in range(n)]
    assert all(torch.equal(copy, before + torch.tensor(eps) * each) for copy, each in zip(seen[1:], z, strict=True))
    losses = [loss(copy).item() for copy in seen]
    assert optimizer.projected_grads == [(l - losses[0]) / eps for l in losses[1:]]  # noqa: E741
    steps = [lr / statistics.stdev(losses[1:]) * g / n for g in optimizer.projected_grads]
    expected = before.double() * (1 - lr * 0.5) - sum(c * each.double() for c, each in zip(steps, z, strict=True))
    assert (theta.double() - expected).abs().max() < 1e-6
    assert mean.item() == pytest.approx((sum(losses[1:]) / n + losses[0]) / 2)


def test_fzoo_leaves_theta_alone_where_losses_are_equal_and_skips_where_one_is_bad():
    theta, answers = torch.ones(5), iter([1.0, 2.0, 2.0, 1.0, 2.0, math.nan, 1.0, 2.0, 3.0])
    optimizer = MeZO([theta], lr=0.1, rule="fzoo", num_perturbations=2, weight_decay=0.5)
    for skipped in (0, 1):
        optimizer.step(lambda: next(answers))
        assert torch.equal(theta, torch.ones(5))
        assert optimizer.skipped_steps == skipped
    optimizer.step(lambda: next(answers))
    assert not torch.equal(theta, torch.ones(5))


def test_conservative_keeps_the_best_of_three_thetas():
    """The losses that it compares are those of theta, theta - c z and theta + c z, from one generator state."""
    theta, seen, draws = torch.linspace(-1, 1, 50), [], []
    before, target = theta.clone(), torch.linspace(1, 2, 50)

    def closure():
        seen.append(theta.clone())
        draws.append(torch.rand(1).item())
        return (theta - target).square().sum()

    optimizer = MeZO([("w", theta)], lr=1e-2, rule="conservative", seed=4)
    optimizer.step(closure)
    assert len(set(draws)) == 1
    _, _, *tried = seen
    c = 1e-2 * optimizer.projected_grads[0]
    z = standard_normal(perturbation_seed(4, 0), "w", 0, 50)
    assert torch.equal(tried[0], before)
    for moved, sign in zip(tried[1:], (-1, 1), strict=True):
        assert (moved - (before + sign * c * z)).abs().max() < 1e-6
    losses = [(moved - target).square().sum() for moved in tried]
    assert torch.equal(theta, tried[losses.index(min(losses))])
    assert losses.index(min(losses)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guided_measures_the_slope_along_the_contrast_of_its_directions(dtype):
    """n calls at theta + eps z, two at theta +- eps v, all from one generator state; another group has its own lr."""
    theta, other, seen, draws = torch.linspace(-1, 1, 50).to(dtype), torch.zeros(10, dtype=dtype), [], []
    before, target, n, eps = theta.clone(), torch.linspace(1, 2, 50), 5, 0.1

    def closure():
        seen.append(theta.clone())
        draws.append(torch.rand(1).item())
        return (theta.float() - target).square().sum() + (other.float() - 1).square().sum()

    groups = [{"params": [("w", theta)]}, {"params": [("v", other)], "lr": 0.0}]
    optimizer = MeZO(groups, lr=1e-2, eps=eps, rule="guided", num_perturbations=n, elite_share=0.4, seed=4)
    mean = optimizer.step(closure)
    assert len(seen) == n + 2
    assert len(set(draws)) == 1
    z = [standard_normal(perturbation_seed(4, 0, k), "w", 0, 50) for k in range(n)]
    assert all(torch.equal(copy, (before + eps * each).to(dtype)) for copy, each in zip(seen, z, strict=False))
    far = [standard_normal(perturbation_seed(4, 0, k), "v", 0, 10) for k in range(n)]

    def loss(*at):
        pairs = zip(at, (target, 1), strict=True)
        return sum((tensor.to(dtype).float() - goal).square().sum() for tensor, goal in pairs).item()

    losses = [loss(before + eps * each, eps * beside) for each, beside in zip(z, far, strict=True)]
    best = sorted(range(n), key=losses.__getitem__)[:2]
    weights = [1 / 2 if k in best else -1 / 3 for k in range(n)]
    v, beside = (sum(w * each for w, each in zip(weights, of, strict=True)) for of in (z, far))
    for moved, sign in zip(seen[n:], (1, -1), strict=True):
        torch.testing.assert_close(moved, (before + sign * eps * v).to(dtype))
    above, below = (loss(at, eps * sign * beside) for at, sign in zip(seen[n:], (1, -1), strict=True))
    slope = (above - below) / (2 * eps)
    torch.testing.assert_close(theta, (before.float() - 1e-2 * slope * v).to(dtype), rtol=1e-2, atol=1e-5)
    assert not other.any()
    assert mean.item() == pytest.approx(sum(losses) / n)


def test_subspace_adam_keeps_directions_and_moments_over_its_steps_and_a_saved_state():
    """Each group by its own betas, as the rule has it; a step that is skipped leaves the moments alone."""

    def made():
        torch.manual_seed(0)
        model = make_model()
        groups = [
            {"params": list(model[0].named_parameters("first")), "betas": (0.5, 0.9)},
            {"params": list(model[2].named_parameters("second"))},
        ]
        return model, MeZO(groups, lr=0.05, rule="subspace-adam", num_perturbations=2, refresh_every=4, seed=3)

    model, optimizer = made()
    rules = [RULES["subspace-adam"](0.5, 0.9, refresh_every=4), RULES["subspace-adam"](refresh_every=4)]
    expected, names = (
        [p.detach().clone() for p in model.parameters()],
        [n for g in optimizer.param_groups for n in g["z_names"]],
    )
    moments = [[], []]
    for step in range(7):
        if step == 5:
            optimizer.step(lambda: math.nan)
            continue
        train(model, optimizer, 1)
        seeds = [perturbation_seed(3, step - step % 4, k) for k in range(2)]
        steps = []
        for i, rule in enumerate(rules):
            moments[i], slopes = rule.remember(moments[i], step, optimizer.projected_grads)
            steps.append([0.05 * a for a in slopes])
        layout = [ParamLayout(dict(zip(names[j : j + 2], expected[j : j + 2], strict=True))) for j in (0, 2)]
        for part, coefficients in zip(layout, steps, strict=True):
            step_(part, list(zip(seeds, coefficients, strict=True)), backend="reference")
        if step == 2:
            state, (model, optimizer) = copy.deepcopy(optimizer.state_dict()), made()
            optimizer.load_state_dict(state)
    assert same(map(bits, expected), theta_of(model))
    assert [group["moments"] for group in optimizer.param_groups] == moments


def test_groups_of_a_subspace_share_its_directions():
    groups = [{"params": [("a", torch.ones(2))]}, {"params": [("b", torch.ones(2))], "refresh_every": 5}]
    with pytest.raises(
        ValueError, match=r"a step has one refresh_every: give all param groups the same, got \[5, 50\]"
    ):
        MeZO(groups, lr=0.1, rule="subspace-adam")


def test_guided_skips_where_a_loss_is_bad():
    theta, answers = torch.ones(5), iter([1.0, 2.0, math.nan, 1.0, 2.0, 3.0, math.inf, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    optimizer = MeZO([theta], lr=0.1, rule="guided", num_perturbations=3, weight_decay=0.5)
    for skipped in (1, 2):
        optimizer.step(lambda: next(answers))
        assert torch.equal(theta, torch.ones(5))
        assert optimizer.skipped_steps == skipped
    optimizer.step(lambda: next(answers))
    assert not torch.equal(theta, torch.ones(5))


def test_guided_needs_three_directions():
    with pytest.raises(ValueError, match="num_perturbations must be >= 3, got 1: the rule guided contrasts directions"):
        MeZO([torch.ones(2)], lr=0.1, rule="guided")


def test_normalised_perturbations_have_one_length():
    theta, seen, eps = torch.zeros(50), [], 1e-2
    optimizer = MeZO([("w", theta)], lr=0.1, eps=eps, normalise_z=True, seed=4)
    optimizer.step(lambda: seen.append(theta.clone()) or 0.0)
    assert seen[0].norm().item() == pytest.approx(eps * 50**0.5, rel=1e-5)
    optimizer.step(lambda: seen.append(theta.clone()) or theta.sum())
    assert seen[2].norm().item() == pytest.approx(seen[0].norm().item(), rel=1e-5)


def test_fzoo_is_of_all_groups():
    groups = [{"params": [("a", torch.ones(2))], "rule": "fzoo"}, {"params": [("b", torch.ones(2))]}]
    with pytest.raises(ValueError, match=r"give all param groups the same rule, got \['fzoo', 'sgd'\]"):
        MeZO(groups, lr=0.1, num_perturbations=2)


@pytest.mark.parametrize("n", [1, 3])
def test_two_closure_calls_a_perturbation_without_autograd(n):
    theta, calls = torch.nn.Parameter(torch.ones(3)), []

    def closure():
        loss = theta.square().sum()
        calls.append(loss.requires_grad)
        return loss

    MeZO([theta], lr=0.1, num_perturbations=n).step(closure)
    assert calls == [False] * (2 * n)


def test_losses_of_one_step_share_the_generator_state():
    """Dropout draws one mask for all calls of a step, and another one in the next step."""
    theta, draws = torch.ones(3), []

    def closure():
        draws.append(torch.rand(1).item())
        return theta.sum()

    optimizer = MeZO([theta], lr=0.0, num_perturbations=2)
    torch.manual_seed(0)
    optimizer.step(closure)
    optimizer.step(closure)
    torch.manual_seed(0)
    first, second, third = torch.rand(1).item(), torch.rand(1).item(), torch.rand(1).item()
    assert draws == [first] * 4 + [second] * 4
    torch.manual_seed(0)
    MeZO([theta], lr=0.0).step(closure)
    MeZO([theta], lr=0.0).step(closure)
    assert torch.rand(1).item() == third


def test_returns_the_mean_loss():
    theta, losses = torch.ones(2), iter([1.0, 2.0, 5.0, 8.0])
    loss = MeZO([theta], lr=0.0, num_perturbations=2).step(lambda: next(losses))
    assert loss.item() == 4.0


def test_weight_decay_is_decoupled_and_once_a_step():
    theta = torch.full((4,), 2.0)
    MeZO([theta], lr=0.1, weight_decay=0.5, num_perturbations=3).step(lambda: 0.0)
    assert torch.equal(theta, torch.full((4,), 2.0) * torch.tensor(0.95))


def test_groups_have_their_own_lr_and_one_eps():
    a, b = torch.ones(8), torch.ones(8)
    optimizer = MeZO([{"params": [a], "lr": 0.0}, {"params": [b]}], lr=0.1)
    optimizer.step(lambda: a.sum() + b.sum())
    assert torch.equal(a, torch.ones(8))
    assert not torch.equal(b, torch.ones(8))
    optimizer.param_groups[0]["eps"] = 0.5
    with pytest.raises(ValueError, match="same"):
        optimizer.step(lambda: a.sum())


def test_lr_schedulers_apply():
    theta, scheduled = torch.ones(4), torch.ones(4)
    plain, optimizer = MeZO([theta], lr=0.1), MeZO([scheduled], lr=torch.tensor(0.2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step(lambda: 0.0)
    scheduler.step()
    plain.step(lambda: 0.0)
    plain.step(lambda: theta.sum())
    optimizer.step(lambda: scheduled.sum())
    assert torch.equal(bits(theta), bits(scheduled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rule",
    [{}, {"rule": "momentum"}, {"rule": "adam"}, {"rule": "adamw"}, {"rule": "sign"}, {"rule": "fzoo", "lr": 1e-5}],
    ids=str,
)
def test_resume_is_bitwise_equal(dtype, rule, tmp_path):
    options = {"lr": 0.05, **rule, "weight_decay": 0.01, "num_perturbations": 2, "seed": 11}
    model = make_model(dtype)
    optimizer = MeZO(model.named_parameters(), **options)
    train(model, optimizer, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    losses = train(model, optimizer, 3)
    resumed = make_model(dtype)
    other = MeZO(resumed.named_parameters(), **{"lr": 1.0, "num_perturbations": 3, **rule})
    train(resumed, other, 1)
    weights, state = torch.load(tmp_path / "run.pt")
    other.load_state_dict(state)
    resumed.load_state_dict(weights)
    assert other.steps == 3
    assert train(resumed, other, 3) == losses
    assert same(theta_of(model), theta_of(resumed))


def test_a_deep_copy_continues_alike():
    model = make_model()
    optimizer = MeZO(model.parameters(), lr=0.05, rule="momentum", momentum=0.5)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 2) == train(twin, twin_optimizer, 2)
    assert same(theta_of(model), theta_of(twin))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_bad_loss_skips_the_step(loss):
    theta = torch.tensor([1.0, -0.0, 3.0])
    before, losses = bits(theta), iter([1.0, loss, 1.0, 0.5])
    optimizer = MeZO([theta], lr=0.1, weight_decay=0.5)
    optimizer.step(lambda: next(losses))
    assert torch.equal(bits(theta), before)
    optimizer.step(lambda: next(losses))
    assert not torch.equal(bits(theta), before)
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)


def test_a_failing_closure_leaves_no_trace():
    theta = torch.randn(50)
    before, optimizer = bits(theta), MeZO([theta], lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert torch.equal(bits(theta), before)
    assert optimizer.steps == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parameters_changed_between_steps_are_read_again(dtype):
    model = make_model(dtype)
    optimizer = MeZO(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    optimizer.step(lambda: 0.0)
    assert torch.equal(model[0].weight, torch.full_like(model[0].weight, 0.5))
    model.double().to(dtype)  # moves the storage
    train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, torch.full_like(model[0].weight, 0.5))


def test_names_decide_z_and_frozen_parameters_stay():
    named, bare = torch.zeros(5), torch.zeros(5)
    frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    MeZO([("0", named)], lr=0.1).step(lambda: named.sum())
    MeZO([bare, frozen], lr=0.1).step(lambda: bare.sum())
    assert torch.equal(named, bare)
    assert torch.equal(frozen, torch.zeros(5))


def test_memory_is_counted_and_shown():
    theta = torch.zeros(100)
    optimizer = MeZO([theta], lr=0.1)
    assert optimizer.memory_bytes == 400
    assert "memory_bytes: 400" in repr(optimizer)
    assert MeZO([theta.bfloat16()], lr=0.1).memory_bytes == 600
    momentum = MeZO([theta], lr=0.1, rule="momentum")
    momentum.step(lambda: 0.0)
    assert momentum.memory_bytes == 800
    adam = MeZO([theta], lr=0.1, rule="adam")
    adam.step(lambda: 0.0)
    assert adam.memory_bytes == 1200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": 0.1, "eps": 0.0}, "eps"),
        ({"lr": 0.1, "rule": "momentum", "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"lr": 0.1, "rule": "lion"}, "rule must be one of adam, adamw, .*, sign, .*; got 'lion'"),
        ({"lr": 0.1, "momentum": 0.9}, "momentum is of the rule momentum, not of sgd"),
        ({"lr": 0.1, "rule": "conservative", "weight_decay": 0.1}, "weight_decay must be 0, got 0.1"),
        ({"lr": 0.1, "rule": "fzoo"}, "num_perturbations must be >= 2, got 1"),
        (
            {"lr": 0.1, "rule": "fzoo", "num_perturbations": 2, "momentum": 0.9},
            "momentum is of the rule momentum, not of",
        ),
        ({"lr": 0.1, "rule": "adam", "momentum": 0.9}, "momentum is of the rule momentum, not of"),
        ({"lr": 0.1, "rule": "adam", "betas": (0.9, 1.0)}, "beta2"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight_decay"),
        ({"lr": 0.1, "num_perturbations": 0}, "num_perturbations"),
        ({"lr": 0.1, "seed": -1}, "seed"),
        ({"lr": 0.1, "distribution": "uniform"}, "distribution"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeZO([torch.ones(2)], **options)


@pytest.mark.parametrize(
    ("closure", "message"),
    [(None, "closure"), (lambda: None, "None"), (lambda: torch.ones(2), "scalar")],
    ids=["missing", "nothing", "vector"],
)
def test_bad_closures_are_refused(closure, message):
    with pytest.raises(ValueError, match=message):
        MeZO([torch.ones(2)], lr=0.1).step(closure)


def test_colliding_names_across_groups_are_refused():
    with pytest.raises(ValueError, match="same tensor_id"):
        MeZO([{"params": [("w", torch.ones(2))]}, {"params": [("w", torch.ones(3))]}], lr=0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_state_of_an_older_version_is_loaded(momentum):
    """Once every option stood in every group, momentum was an option of sgd, and older ones knew no rule at all."""
    theta, same = (torch.nn.Parameter(torch.ones(5)) for _ in "ab")
    rule = {"rule": "momentum", "momentum": momentum} if momentum else {}
    old, new = MeZO([("theta", theta)], lr=0.1, **rule), MeZO([("theta", same)], lr=0.1)
    old.step(lambda: theta.square().sum())
    state = old.state_dict()
    beside = ("seed", "num_perturbations", "distribution", "steps", "skipped_steps", "projected_grads")
    for group in state["param_groups"]:
        state["mezo"] = {name: group.pop(name) for name in beside}
        group["momentum"] = momentum
        for name in ("rule", "z_names", "normalise_z") if momentum else ("rule", "z_names", "normalise_z", "updates"):
            del group[name]
    new.load_state_dict(state)
    for optimizer, p in ((old, theta), (new, same)):
        optimizer.step(lambda p=p: p.square().sum())
    assert torch.equal(theta, same)
