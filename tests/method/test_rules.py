"""The rules as objects: one folder, one class each; a new one is a class and nothing else."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mezo import MeZO, train
from mezo.method.estimator import Losses
from mezo.method.rules import RULES, Rule
from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Step, Update
from mezo.run import logbook
from mezo.run.replay import rebuild
from mezo_kernels import Rule as Kernel
from mezo_kernels import standard_normal
from tests.method.test_theory import DIMENSION, EPS, assert_mean, quadratic

__all__ = ["quadratic"]  # a fixture


def test_every_kernel_rule_has_its_rule():
    kernels = {rule().kernel().kind for rule in RULES.values() if rule().kernel()}
    assert kernels == {"momentum", "adam", "adamw", "sign"}
    assert set(RULES) == kernels | {
        "sgd", "fzoo", "conservative", "one-sided", "z-score", "ranks", "aligned", "guided",
        "subspace-adam",
    }  # fmt: skip


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_log_gives_back_the_rule(rule):
    logged = LoggedRule(RULES[rule](), 0.1 if rule == "adam" else 0.0, ("*bias*",), True)
    assert LoggedRule.of_header({"rule": logged.header()}) == logged


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_loss_that_is_no_number_changes_nothing(rule):
    losses = Losses((1.0, float("nan")), (1.0, 2.0))
    update = RULES[rule]().plan((1, 2), losses.projected_grads(0.1), losses, lr=0.1, weight_decay=0.1)
    assert update == Update.skip((1, 2))


@pytest.mark.parametrize(("rule", "scale"), [("sgd", 0.5), ("sign", 1.0), ("adam", 1.0)])
def test_coefficients_are_the_estimates_over_n_and_over_the_norms(rule, scale):
    losses = Losses((3.0, 1.0), (1.0, 2.0))
    update = RULES[rule]().plan((1, 2), (8.0, -2.0), losses, lr=0.5, clip=4.0, norms=(1.0, 2.0))
    assert update.coefficients == (scale * 4.0 / 2, scale * -2.0 / 2 / 2.0)
    assert update.lr == (0.5 if scale == 1.0 else None)


def test_ranks_are_the_same_under_any_increasing_function_of_the_loss():
    plan = lambda plus, minus: RULES["ranks"]().plan((1, 2, 3), (0.0,) * 3, Losses(plus, minus), lr=1.0)  # noqa: E731
    plain = plan((1.0, 2.0, 3.0), (1.5, 0.5, 9.0))
    assert plain.coefficients == pytest.approx([(1 - 2) / 15, (3 - 0) / 15, (4 - 5) / 15])
    assert plan(*[tuple(math.exp(loss) for loss in side) for side in ((1.0, 2.0, 3.0), (1.5, 0.5, 60.0))]) == plain
    assert plan((2.0,) * 3, (2.0,) * 3).coefficients == (0.0,) * 3


def test_z_scores_are_the_same_under_a_scale_and_an_offset():
    def plan(scale, offset):
        losses = Losses((1.0 * scale + offset, 3.0 * scale + offset), (2.0 * scale + offset, 0.5 * scale + offset))
        return RULES["z-score"]().plan((1, 2), losses.projected_grads(0.5), losses, lr=1.0).coefficients

    assert plan(16.0, -8.0) == pytest.approx(plan(1.0, 0.0), rel=1e-12)
    assert plan(1.0, 0.0) == pytest.approx([-1.0 / 2 / 1.1086778, 2.5 / 2 / 1.1086778], rel=1e-6)


def directions(n, d, start=0):
    return torch.stack([standard_normal(seed, "theta", 0, d).double() for seed in range(start, start + n)])


def along(z, grads, rule="aligned", **options):
    """sum_k coefficients_k z_k of a step with these slopes, lr 1."""
    n = len(z)
    losses, products = Losses((1.0,) * n, (0.0,) * n), (z @ z.mT).tolist()
    update = RULES[rule]().plan(tuple(range(n)), grads, losses, lr=1.0, products=products, **options)
    return torch.tensor(update.coefficients, dtype=torch.float64) @ z


def test_aligned_has_the_slopes_that_were_measured():
    """Along every z, over the one scale that makes it the plain average of orthogonal z."""
    z, grads = directions(12, 30), torch.linspace(-2, 3, 12, dtype=torch.float64)
    step = along(z, grads.tolist())
    torch.testing.assert_close(12 / z.square().sum(1).mean() * z @ step, grads)
    clipped = along(z, grads.tolist(), clip=0.5)
    torch.testing.assert_close(12 / z.square().sum(1).mean() * z @ clipped, grads.clamp(-0.5, 0.5))


def test_aligned_is_plain_descent_along_orthogonal_directions():
    z, grads = 3.0 * torch.eye(5, dtype=torch.float64), [1.0, -2.0, 0.5, 4.0, 0.0]
    torch.testing.assert_close(along(z, grads), along(z, grads, "sgd"))


@pytest.mark.parametrize("n", [8, 16, 24])
def test_aligned_points_along_the_gradient_as_theory_says(n):
    """Mean square cosine n / d, against about n / (n + d + 1) of the average."""
    d, found = 32, {"aligned": [], "sgd": []}
    grad = torch.linspace(-1, 2, d, dtype=torch.float64)
    for start in range(0, 400 * n, n):
        z = directions(n, d, start)
        for rule, squares in found.items():
            step = along(z, (z @ grad).tolist(), rule)
            squares.append((step @ grad) ** 2 / (step @ step) / (grad @ grad))
    aligned, plain = (torch.stack(found[rule]) for rule in ("aligned", "sgd"))
    assert_mean(aligned, n / d)
    assert aligned.mean() > plain.mean() + 4 * plain.std() / 20
    assert plain.mean().item() == pytest.approx(n / (n + d + 1), rel=0.1)


A_SQUARED = {3: 1.5 + 9 * 3**0.5 / (8 * math.pi), 4: 1 + 2 * 3**0.5 / math.pi}
"""E[A^2], A the contrast of the lower floor(n / 2) of n normal numbers with the others: moments of order statistics."""


def guided(z, loss, theta, eps, rule=None):
    """The estimate of a step by the rule guided, from a loss of float64 thetas."""
    rule = rule or RULES["guided"]()
    losses = Losses(tuple(loss(theta + eps * z).tolist()), (0.0,) * len(z)).against_mean()
    v = torch.tensor(rule.contrast(losses), dtype=torch.float64) @ z
    slopes = rule.slopes((), (loss(theta + eps * v).item(), loss(theta - eps * v).item()), eps)
    update = rule.plan(tuple(range(len(z))), slopes, losses, lr=1.0)
    return torch.tensor(update.coefficients, dtype=torch.float64) @ z


@pytest.mark.parametrize("n", [3, 4])
def test_guided_is_unbiased_but_for_the_factor_of_theory(quadratic, n):
    """On a quadratic, so near that curvature changes no rank: E[A^2] grad, and as much noise across it as v is long."""
    loss, theta, grad = quadratic
    z = [directions(n, DIMENSION, start) for start in range(0, 2000 * n, n)]
    found = torch.stack([guided(each, loss, theta, EPS) for each in z])
    assert_mean(found, A_SQUARED[n] * grad)
    across = found - (found @ grad)[:, None] * grad / (grad @ grad)
    length = 1 / (n // 2) + 1 / (n - n // 2)
    assert_mean(across.square().sum(1), A_SQUARED[n] * length * (DIMENSION - 1) * (grad @ grad))


def test_guided_by_two_is_plain_descent_along_their_difference(quadratic):
    """Whichever of the two is better: the estimate is even in v. So two of the four passes decide nothing."""
    loss, theta, grad = quadratic
    for seed in range(20):
        z = directions(2, DIMENSION, 2 * seed)
        v = z[0] - z[1]
        torch.testing.assert_close(guided(z, loss, theta, 0.5), (v @ grad) * v, rtol=1e-9, atol=0)


def test_guided_steps_do_not_depend_on_the_scale_of_what_it_selects_by(quadratic):
    """Any increasing function of the screening losses gives the same contrast; the elite are of the least losses."""
    rule = RULES["guided"](elite_share=0.3)
    losses = Losses((3.0, 1.0, 2.0, 9.0, 4.0, 0.0, 7.0), (0.0,) * 7)
    assert rule.contrast(losses) == (-0.2, 0.5, -0.2, -0.2, -0.2, 0.5, -0.2)
    assert rule.contrast(Losses(tuple(map(math.exp, losses.plus)), losses.minus)) == rule.contrast(losses)


def test_guided_clips_the_slope_that_it_measured():
    losses = Losses((3.0, 1.0, 2.0, 9.0), (0.0,) * 4)
    plan = lambda slope, **options: RULES["guided"]().plan(range(4), (slope,), losses, lr=0.5, **options).coefficients  # noqa: E731
    assert plan(8.0, clip=2.0) == plan(2.0) == (-0.5, 0.5, 0.5, -0.5)
    assert plan(2.0, norms=(1.0, 2.0, 4.0, 1.0)) == (-0.5, 0.25, 0.125, -0.5)


def test_subspace_adam_is_adam_on_the_coordinates_of_the_subspace(quadratic):
    """torch's own, in float64, on x with theta = theta_0 + sum_k x_k z_k: slopes on a quadratic are its derivatives."""
    loss, theta, _ = quadratic
    rule, lr, eps, n = RULES["subspace-adam"](beta1=0.8, beta2=0.9, refresh_every=100), 0.05, 0.5, 3
    z, x, moments = directions(n, DIMENSION), torch.zeros(n, dtype=torch.float64, requires_grad=True), []
    adam = torch.optim.Adam([x], lr=lr, betas=(0.8, 0.9), eps=1e-8)
    here = theta.clone()
    for step in range(60):
        adam.zero_grad()
        loss(theta + x @ z).backward()
        adam.step()
        losses = Losses(tuple(loss(here + eps * z).tolist()), tuple(loss(here - eps * z).tolist()))
        moments, slopes = rule.remember(moments, step, losses.projected_grads(eps))
        update = rule.plan(range(n), slopes, losses, lr)
        here = here - torch.tensor(update.coefficients, dtype=torch.float64) @ z
        torch.testing.assert_close(here, theta + x.detach() @ z, rtol=1e-9, atol=1e-9)
    assert loss(here) < 0.9 * loss(theta)


def test_subspace_adam_begins_its_first_moments_anew_with_the_directions():
    """The second moments go on, and those of a number of directions that is another begin anew."""
    rule = RULES["subspace-adam"](beta1=0.5, beta2=0.5, refresh_every=2)
    moments, _ = rule.remember([], 0, [4.0, 2.0])
    moments, _ = rule.remember(moments, 1, [4.0, 2.0])
    assert moments == [0.0, 0.25, 0.25, 3.0, 1.5, 12.0, 3.0]
    after, slopes = rule.remember(moments, 2, [4.0, -2.0])
    assert after == [1.0, 0.5, 0.125, 2.0, -1.0, 14.0, 3.5]
    assert slopes == pytest.approx([1.0, -1.0], rel=1e-7)
    assert rule.remember(moments, 2, [4.0])[0] == [1.0, 0.5, 0.5, 2.0, 8.0]
    assert rule.remember(moments, 1, [9.0, -9.0], clip=4.0) == rule.remember(moments, 1, [4.0, -4.0])


def test_directions_of_a_subspace_stay_for_its_steps():
    seeds = [Step.of_run(3, number, 2, 0.1, period=4).seeds for number in range(9)]
    assert seeds[0] == seeds[3] != seeds[4] == seeds[7] != seeds[8]
    assert seeds[4] == Step.of_run(3, 4, 2, 0.1).seeds


def test_more_directions_than_parameters_decide_nothing():
    z = directions(6, 5)
    assert not along(z, [1.0] * 6).any()


def test_a_toy_rule_is_one_class(tiny_config):
    """It is known to the optimizer, to runs and to their logs as soon as it is defined."""
    known = dict(RULES)

    @dataclass(frozen=True)
    class Tenth(Rule):
        """A tenth of the plain step."""

        name: ClassVar[str] = "tenth"
        summary: ClassVar[str] = "a tenth of the plain step"

        def scale(self, lr, losses):
            return lr / 10

    try:
        slow, plain = torch.zeros(5), torch.zeros(5)
        for theta, options in ((slow, {"rule": "tenth", "lr": 1.0}), (plain, {"lr": 0.1})):
            MeZO([("w", theta)], **options).step(lambda theta=theta: theta.sum())
        assert torch.equal(slow, plain)
        assert slow.any()
        assert LoggedRule.of_header({"rule": LoggedRule(Tenth()).header()}).rule == Tenth()
        config = tiny_config.replace(update_rule="tenth", steps=4, eval_every=4)
        train(config)
        assert logbook.verify(config.machine.output_dir) == 4
        assert rebuild(config.machine.output_dir, "last")[1]["rule"]["name"] == "tenth"
    finally:
        RULES.clear()
        RULES.update(known)


def test_a_step_of_a_run_is_a_function_of_its_number():
    first, again = (Step.of_run(3, 5, 2, 0.1) for _ in range(2))
    assert first == again
    assert len({*first.seeds, *Step.of_run(3, 6, 2, 0.1).seeds, *Step.of_run(4, 5, 2, 0.1).seeds}) == 6
    halved = Step.of_run(3, 5, 2, 0.1, norm=lambda seed: 2.0)
    assert halved.eps == (0.05, 0.05)
    with pytest.raises(ValueError, match="got 1 for 2 seeds"):
        Step([1, 2], [0.1])


def test_kernels_of_adam_differ_in_where_the_decay_is():
    adam, adamw = RULES["adam"](), RULES["adamw"]()
    assert (adam.decay(0.1, 0.5), adam.l2(0.5)) == (1.0, 0.5)
    assert (adamw.decay(0.1, 0.5), adamw.l2(0.5)) == (0.95, 0.0)
    assert adam.kernel(0.5) == Kernel("adam", l2=0.5)
