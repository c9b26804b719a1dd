"""Every update rule on a quadratic, from the losses of the perturbed copies on: descent, sign and scale."""

import dataclasses

import torch

from mezo.config import Config
from mezo.method.estimator import Losses
from mezo.method.schedule import learning_rate
from mezo.method.step import Step
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, inner_products, root_mean_square
from tests.training.test_update_rules import OPTIONS, each_rule

D, STEPS = 20, 300
TARGET = torch.linspace(-1, 1, D, dtype=torch.float64)
LR = {
    "momentum": 2e-3,
    "adam": 0.2,
    "adamw": 0.2,
    "sign": 0.1,
    "fzoo": 1.6e-3,
    "subspace-adam": 0.1,
    "z-score": 1.6e-3,
    "ranks": 0.2,
}  # others 0.02
ADAM = ("adam", "adamw", "subspace-adam")


def loss(theta):
    """|theta - TARGET|**2 / 2; float64, of a float32 theta."""
    return ((theta.double() - TARGET).square().sum() / 2).item()


def descend(rule, steps=STEPS, factor=1.0, start=3.0, **changes):
    """theta after steps of a rule on factor * loss, as a run makes them."""
    options = {"update_rule": rule, **OPTIONS[rule], "lr": LR.get(rule, 0.02), "lr_schedule": "linear"}
    options |= {"weight_decay": 0.0, "no_decay": (), "warmup_steps": 0, "adam_eps": 1e-8, **changes}
    if options["update_rule"] not in ADAM:
        options.pop("adam_eps")
    config = Config.of(model="m", output_dir="o", task="sst2", steps=STEPS, **options)
    master = ParamLayout({"w": torch.full((D,), start)})
    copies = [master.like([torch.full((D,), torch.nan)]) for _ in range(2 * config.method.perturbations)]
    pairs = list(zip(copies[::2], copies[1::2], strict=True))
    theta, updates = PerturbedTheta(master, pairs, None, config.method.logged_rule), []
    moments = []
    measured, rule = lambda copy: factor * loss(copy.tensors[0]), config.method.rule
    norm = (lambda seed: root_mean_square({"w": (D,)}, seed)) if config.method.normalise_z else None
    for number in range(steps):
        step = Step.of_run(0, number, config.method.perturbations, config.method.eps, norm, rule.period)
        theta.update(updates, step)
        if rule.one_sided:
            assert torch.equal(pairs[0][1].tensors[0], master.tensors[0]), "one-sided: theta itself"
        minus = [measured(pairs[0][1])] * len(pairs) if rule.one_sided else [measured(minus) for _, minus in pairs]
        losses = Losses(tuple(measured(plus) for plus, _ in pairs), tuple(minus))
        losses, tried = losses.against_mean() if rule.guides else losses, ()
        if rule.guides:
            theta.perturb(dataclasses.replace(step, weights=rule.contrast(losses)))
            tried = [measured(copy) for copy in pairs[0]]
        lr = learning_rate(
            number, config.method.steps, config.method.lr, config.method.lr_schedule, config.method.warmup_steps
        )
        norms = [norm(seed) for seed in step.seeds] if norm else []
        grads = losses.projected_grads(config.method.half_distance)
        products = inner_products({"w": (D,)}, step.seeds).tolist() if rule.projects else []
        given = lr, config.method.weight_decay, config.method.clip, norms, products
        slopes = rule.slopes(grads, tried, config.method.eps)
        moments, slopes = rule.remember(moments, number, slopes, config.method.clip)
        update = rule.plan(step.seeds, slopes, losses, *given)
        if rule.compares:
            (c,) = update.coefficients
            theta.perturb(Step(step.seeds, abs(c)))
            above, below = (measured(copy) for copy in (pairs[0] if c > 0 else pairs[0][::-1]))
            update = rule.choose(update, (factor * loss(master.tensors[0]), below, above))
        updates = [update]
    theta.update(updates)
    return master.tensors[0]


@each_rule
def test_it_descends_and_with_the_sign_flipped_it_climbs(rule):
    start = loss(torch.full((D,), 3.0))
    assert loss(descend(rule)) < 0.05 * start
    assert loss(descend(rule, factor=-1.0)) > 1.5 * start


@each_rule
def test_the_first_step_is_odd_in_the_loss_and_linear_in_lr(rule):
    """From zero, without decay, to the bit."""
    first = descend(rule, steps=1, start=0.0)
    lr = LR.get(rule, 0.02)
    assert first.abs().max() > 0
    assert torch.equal(descend(rule, steps=1, start=0.0, factor=-1.0), -first)
    assert torch.equal(descend(rule, steps=1, start=0.0, lr=2 * lr), 2 * first)


@each_rule
def test_a_loss_of_twice_the_size(rule):
    """Moves theta twice as far; rules that normalise move it as far as before."""
    adam = {"adam_eps": 1e-30} if rule in ADAM else {}
    once, twice = (descend(rule, steps=1, start=0.0, factor=factor, **adam) for factor in (1.0, 2.0))
    assert torch.equal(twice, once if rule in (*ADAM, "sign", "fzoo", "z-score", "ranks") else 2 * once)
