"""Other estimators against theory, on the quadratic of `test_theory`, whose gradient is `grad` and whose Hessian is A.

Rademacher u: u . u = d, so E|g u|^2 = d |grad|^2; E[(u . grad)^2 u_i u_j] is 2 grad_i grad_j off the diagonal and
|grad|^2 on it. Normalised z is on the sphere of radius sqrt(d): E[z_i^2 z_j^2] = d / (d + 2), E[z_i^4] = 3 d / (d + 2).
One-sided, g = u . grad + eps / 2 u . Au exactly. The second term is even in u: times u its mean is zero, so on a
quadratic there is no bias at all, and eps^2 / 4 E[(u . Au)^2], with (tr A)^2 + 2 (|A|^2 - sum_i A_ii^2) for the
expectation, is what it adds to E|g u|^2 / d.
"""

import math

import pytest
import torch

from mezo.method.estimator import projected_grad
from mezo.method.rules.fzoo import deviation
from mezo_kernels import perturbation_seed, rademacher, root_mean_square, standard_normal
from tests.method.test_theory import DIMENSION, DRAWS, EPS, assert_mean, quadratic

__all__ = ["quadratic"]  # a fixture
WIDE = 0.5  # eps at which curvature shows
D = DIMENSION


def normalised(seed, name, start, n):
    return standard_normal(seed, name, start, n).double() / root_mean_square({name: (n,)}, seed)


KINDS = {"rademacher": (rademacher, EPS, 2), "normalised": (normalised, EPS, 2), "one-sided": (rademacher, WIDE, 1)}
"""(draw, eps, sides)"""


@pytest.fixture(scope="module", params=KINDS)
def estimates(request, quadratic):
    """(kind, directions, losses at theta + eps z, g z) of many steps: (DRAWS, D), (DRAWS,), (DRAWS, D)."""
    loss, theta, _ = quadratic
    draw, eps, sides = KINDS[request.param]
    z = torch.stack([draw(perturbation_seed(0, step), "theta", 0, D).double() for step in range(DRAWS)])
    plus, minus = loss(theta + eps * z), loss(theta - eps * z) if sides == 2 else loss(theta).expand(DRAWS)
    pairs = zip(plus.tolist(), minus.tolist(), strict=True)
    g = torch.tensor([projected_grad(*pair, eps * sides / 2) for pair in pairs], dtype=torch.float64)
    return request.param, z, plus, g[:, None] * z


def curvature(quadratic):
    """(tr A)^2 and 2 (|A|^2 - sum_i A_ii^2): the mean of u . Au squared, and its variance."""
    loss, theta, _ = quadratic
    a = torch.autograd.functional.hessian(loss, theta)
    return a.trace() ** 2, 2 * (a.square().sum() - a.diag().square().sum())


def mean_square(kind, quadratic):
    """E|g z|^2."""
    grad = quadratic[2]
    extra = WIDE**2 / 4 * sum(curvature(quadratic)) if kind == "one-sided" else 0.0
    return D * (grad @ grad + extra)


def test_directions_have_one_length(estimates):
    _, z, _, _ = estimates
    torch.testing.assert_close(z.square().sum(-1), torch.full((DRAWS,), float(D), dtype=torch.float64))


def test_the_estimate_is_unbiased(quadratic, estimates):
    assert_mean(estimates[-1], quadratic[2])


@pytest.mark.parametrize("estimates", ["rademacher", "normalised"], indirect=True)
def test_its_covariance_is_that_of_theory(quadratic, estimates):
    grad = quadratic[2]
    square, outer = grad @ grad * torch.eye(D), torch.outer(grad, grad)
    kind, _, _, found = estimates
    expected = {
        "rademacher": square + outer - 2 * outer.diag().diag(),
        "normalised": D / (D + 2) * (square + 2 * outer) - outer,
    }[kind]
    off = found - grad
    assert_mean((off[:, :, None] * off[:, None, :]).flatten(1), expected.flatten())


def test_its_mean_square_is_that_of_theory(quadratic, estimates):
    """Curvature is more than a tenth of it where the estimate is one-sided, so the test sees it."""
    kind, _, _, found = estimates
    assert_mean(found.square().sum(-1), mean_square(kind, quadratic))
    if kind == "one-sided":
        assert mean_square(kind, quadratic) > 1.1 * D * quadratic[2] @ quadratic[2]


@pytest.mark.parametrize("n", [2, 8])
def test_n_perturbations_divide_the_variance_by_n(quadratic, estimates, n):
    """Also one-sided: the loss at theta that the n share is no random number."""
    grad = quadratic[2]
    kind, _, _, found = estimates
    means = found.unflatten(0, (-1, n)).mean(1)
    assert_mean(means, grad)
    assert_mean((means - grad).square().sum(-1), (mean_square(kind, quadratic) - grad @ grad) / n)


def test_one_sided_the_error_is_half_eps_times_the_curvature(quadratic):
    """In each estimate, exactly, however large eps is."""
    loss, theta, grad = quadratic
    a = torch.autograd.functional.hessian(loss, theta)
    for seed in range(5):
        u = rademacher(seed, "theta", 0, D).double()
        found = projected_grad(loss(theta + 3 * u).item(), loss(theta).item(), 3 / 2)
        assert found == pytest.approx((u @ grad + 3 / 2 * u @ a @ u).item(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("estimates", ["rademacher", "one-sided"], indirect=True)
def test_the_deviation_of_the_losses_is_eps_times_the_gradient(quadratic, estimates, n):
    """E sigma^2 = eps^2 |grad|^2 + eps^4 / 4 Var(u . Au) under Rademacher u: what fzoo divides by."""
    kind, _, plus, _ = estimates
    eps, grad, varying = KINDS[kind][1], quadratic[2], curvature(quadratic)[1]
    found = torch.tensor([deviation(losses) for losses in plus.view(-1, n).tolist()], dtype=torch.float64)
    assert_mean(found.square(), eps**2 * (grad @ grad) + eps**4 / 4 * varying)
    assert math.sqrt(found.square().mean()) == pytest.approx(eps * grad.norm().item(), rel=0.2)
