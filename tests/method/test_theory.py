"""The estimator against what theory says of it: SPSA under normal z (Spall 1992; Nesterov & Spokoiny 2017; MeZO).

On a quadratic g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) is z . grad exactly. So E[g z] = grad and, by
Isserlis' theorem, Cov[g z] = |grad|^2 I + grad grad^T, hence E|g z|^2 = (d + 2) |grad|^2.
Averaging n directions divides the covariance by n (MeZO, arXiv 2305.17333, lemma 2).
"""

import math

import pytest
import torch

from mezo.config import Config
from mezo.method.estimator import projected_grad
from mezo.method.objectives import cross_entropy
from mezo.method.step import Step
from mezo.models.load import load_tokenizer
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.tasks import load_splits
from mezo_kernels import lora_init, perturbation_seed, standard_normal
from tests.tiny_models import LAST_LAYER, build, save

DIMENSION, DRAWS = 6, 20_000
ERRORS = 4  # standard errors of a mean that it may lie off
EPS = 1e-2


@pytest.fixture(scope="module")
def quadratic():
    """L(theta) = theta^T A theta / 2 with a fixed A, and a point where no part of the gradient is small."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    theta = torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / DIMENSION + torch.eye(DIMENSION)
    return lambda x: (x @ matrix * x).sum(-1) / 2, theta, matrix @ theta


def directions(n, run_seed=0):
    """z of a run's steps and perturbations, (n, DIMENSION) float64: the stream that training draws from."""
    draw = lambda step: standard_normal(perturbation_seed(run_seed, step, 0), "theta", 0, DIMENSION)  # noqa: E731
    return torch.stack([draw(step) for step in range(n)]).double()


@pytest.fixture(scope="module")
def estimates(quadratic):
    """g z of many steps, (DRAWS, DIMENSION)."""
    loss, theta, _ = quadratic
    z = directions(DRAWS)
    pairs = zip(loss(theta + EPS * z).tolist(), loss(theta - EPS * z).tolist(), strict=True)
    g = torch.tensor([projected_grad(plus, minus, EPS) for plus, minus in pairs], dtype=torch.float64)
    return g[:, None] * z


def assert_mean(samples, expected):
    """Every mean over the first dimension lies within ERRORS standard errors of what theory says."""
    error = samples.std(0) / math.sqrt(len(samples))
    off = (samples.mean(0) - expected).abs() / error
    assert float(off.max()) < ERRORS, off


def test_the_estimate_is_unbiased(quadratic, estimates):
    assert_mean(estimates, quadratic[2])


def test_its_covariance_is_that_of_theory(quadratic, estimates):
    grad = quadratic[2]
    off = estimates - grad
    products = (off[:, :, None] * off[:, None, :]).flatten(1)
    assert_mean(products, (grad @ grad * torch.eye(DIMENSION) + torch.outer(grad, grad)).flatten())


def test_its_mean_square_is_d_plus_2_times_that_of_the_gradient(quadratic, estimates):
    grad = quadratic[2]
    assert_mean(estimates.square().sum(-1), (DIMENSION + 2) * grad @ grad)


@pytest.mark.parametrize("n", [2, 8])
def test_n_perturbations_divide_the_variance_by_n(quadratic, estimates, n):
    """Var = E|mean - grad|^2 = (d + 1) |grad|^2 / n, and the mean stays where it was."""
    grad = quadratic[2]
    means = estimates.unflatten(0, (-1, n)).mean(1)
    assert_mean(means, grad)
    assert_mean((means - grad).square().sum(-1), (DIMENSION + 1) * grad @ grad / n)


def test_the_difference_is_exact_on_a_quadratic(quadratic):
    """No O(eps^2) term: the third derivative is zero, so eps may be as large as one likes."""
    loss, theta, grad = quadratic
    for z in directions(5):
        estimate = projected_grad(loss(theta + 3 * z).item(), loss(theta - 3 * z).item(), 3)
        assert estimate == pytest.approx((z @ grad).item(), rel=1e-12)


@pytest.fixture(scope="module", params=["gpt_neox", "bert"])
def transformer(request):
    """A tiny transformer in float64 and a loss over two options at one position, as `mezo train` has.

    These two are float64 and smooth throughout; Llama's norms compute in float32, and OPT has kinks.
    """
    model = build(request.param).double()
    ids = torch.randint(3, 24, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1, 0])

    def loss():
        return cross_entropy(model(input_ids=ids).logits[:, -1, 5:7].log_softmax(-1), labels)

    return model, loss


def derivative(model, loss, seed):
    """z . grad by autograd, with the z of the seed."""
    grads = torch.autograd.grad(loss(), list(model.parameters()), allow_unused=True)
    named = zip(model.named_parameters(), grads, strict=True)
    parts = [
        standard_normal(seed, name, 0, p.numel()).double().view_as(p) * g for (name, p), g in named if g is not None
    ]
    return sum(part.sum() for part in parts).item()


@torch.no_grad()
def estimate(model, loss, seed, eps, signs=(1, -1)):
    """projected_grad under the z of the seed, every parameter perturbed about the same float64 theta."""
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for sign in signs:
        for name, p in model.named_parameters():
            p.copy_(theta[name] + sign * eps * standard_normal(seed, name, 0, p.numel()).double().view_as(p))
        losses.append(loss().item())
    for name, p in model.named_parameters():
        p.copy_(theta[name])
    return projected_grad(*losses, eps * (signs[0] - signs[1]) / 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_sided_the_error_of_an_estimate_is_of_first_order(transformer, seed):
    """It falls tenfold when eps falls tenfold: eps / 2 z . Hz."""
    model, loss = transformer
    expected = derivative(model, loss, seed)
    errors = [estimate(model, loss, seed, eps, signs=(1, 0)) - expected for eps in (1e-4, 1e-5)]
    curvature = (estimate(model, loss, seed, 1e-4, (1, 0)) - estimate(model, loss, seed, 1e-4, (0, -1))) / 1e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.02)
    assert errors[1] == pytest.approx(1e-5 / 2 * curvature, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projected_grad_is_the_directional_derivative(transformer, seed):
    """Within O(eps^2): the error falls a hundredfold when eps falls tenfold."""
    model, loss = transformer
    expected = derivative(model, loss, seed)
    errors = [abs(estimate(model, loss, seed, eps) - expected) for eps in (1e-3, 1e-4, 1e-5)]
    assert errors[2] < 1e-6 * max(1, abs(expected))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.02)


SMALL, FLOAT32 = 2e-3, 1e-3  # eps, and what eps^2 and the rounding of two losses over 2 eps add to |grad| there


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_what_a_run_measures_is_the_directional_derivative(family, cache, tiny_data, tmp_path):
    """The runtime's own losses, in float32 and through the trunk cache, against its autograd, at an adapter with B."""
    options = dict(model=save(family, tmp_path), **tiny_data, output_dir="unused", batch_size=48, trunk_cache=cache)
    config = Config.of(**options, prompt="{text} It was", label_words=(" terrible", " great"),
                    target_modules=LAST_LAYER[family], layers_to_transform=(2,))  # fmt: skip
    runtime, splits = HFRuntime(*config.for_runtime), load_splits(config, load_tokenizer(config.model.base))
    runtime.prepare(splits)
    runtime.load({name: 0.3 * lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()})
    labels = torch.tensor([example.label for example in splits["train"]])
    batch = range(len(labels))
    gradient = runtime.gradient("train", batch, lambda scores: cross_entropy(scores, labels))
    for seed in range(4):
        runtime.perturb(Step([seed], SMALL))
        ((plus, minus),) = runtime.score_pairs("train", batch)
        got = projected_grad(cross_entropy(plus, labels).item(), cross_entropy(minus, labels).item(), SMALL)
        parts = {name: standard_normal(seed, name, 0, part.numel()) for name, part in gradient.items()}
        expected = sum((parts[name] @ part.flatten()).item() for name, part in gradient.items())
        scale = math.sqrt(sum(part.square().sum().item() for part in gradient.values()))
        assert got == pytest.approx(expected, abs=FLOAT32 * scale)
