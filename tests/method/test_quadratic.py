"""Every update rule on a quadratic, from the losses of the perturbed copies on: descent, sign and scale."""

import torch

from mezo.config import Config
from mezo.config.checks import STATEFUL
from mezo.method.estimator import best_of_three, planned, projected_grad
from mezo.method.rules.base import UpdateRule
from mezo.method.step import StepUpdate
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, perturbation_seed, root_mean_square
from tests.training.test_update_rules import OPTIONS, each_rule

D, STEPS = 20, 300
TARGET = torch.linspace(-1, 1, D, dtype=torch.float64)
LR = {"momentum": 2e-3, "adam": 0.2, "adamw": 0.2, "sign": 0.1, "fzoo": 1.6e-3}  # others 0.02


def loss(theta):
    """|theta - TARGET|**2 / 2; float64, of a float32 theta."""
    return ((theta.double() - TARGET).square().sum() / 2).item()


def descend(rule, steps=STEPS, factor=1.0, start=3.0, **changes):
    """theta after steps of a rule on factor * loss, as a run makes them."""
    options = {"update_rule": rule, **OPTIONS[rule], "lr": LR.get(rule, 0.02), "lr_schedule": "linear"}
    options |= {"weight_decay": 0.0, "no_decay": (), "warmup_steps": 0, "adam_eps": 1e-8, **changes}
    if options["update_rule"] not in ("adam", "adamw"):
        options.pop("adam_eps")
    config = Config(model="m", output_dir="o", task="sst2", steps=STEPS, **options)
    master = ParamLayout({"w": torch.full((D,), start)})
    copies = [master.like([torch.empty(D)]) for _ in range(2 * config.num_perturbations)]
    pairs = list(zip(copies[::2], copies[1::2], strict=True))
    theta, updates = PerturbedTheta(master, pairs, None, UpdateRule.of(config, ["w"])), []
    measured = lambda copy: factor * loss(copy.tensors[0])  # noqa: E731
    for step in range(steps):
        seeds = [perturbation_seed(0, step, k) for k in range(config.num_perturbations)]
        norms = [root_mean_square({"w": (D,)}, seed) for seed in seeds] if config.normalise_z else []
        theta.step(updates, seeds, [config.eps / norm for norm in norms] or config.eps)
        if config.half_distance < config.eps:
            assert torch.equal(pairs[0][1].tensors[0], master.tensors[0]), "one-sided: theta itself"
        here, one_sided = measured(pairs[0][1]), config.half_distance < config.eps
        losses = [(measured(plus), here if one_sided else measured(minus)) for plus, minus in pairs]
        grads = tuple(projected_grad(*pair, config.half_distance) for pair in losses)
        steps_, decay, lr = planned(config, step, grads, [plus for plus, _ in losses], norms)
        if config.update_rule == "conservative":
            c = abs(steps_[0])
            theta.step([], seeds, c)
            tried = factor * loss(master.tensors[0]), measured(pairs[0][1]), measured(pairs[0][0])
            steps_, _ = best_of_three(steps_[0], tried if steps_[0] > 0 else (tried[0], *tried[:0:-1]))
        updates = [StepUpdate(seeds, steps_, decay, lr if config.update_rule in STATEFUL else None)]
    theta.step(updates, [], 1.0)
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
    adam = {"adam_eps": 1e-30} if rule in ("adam", "adamw") else {}
    once, twice = (descend(rule, steps=1, start=0.0, factor=factor, **adam) for factor in (1.0, 2.0))
    assert torch.equal(twice, once if rule in ("adam", "adamw", "sign", "fzoo") else 2 * once)
