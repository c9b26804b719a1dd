"""Runs under every update rule: one list of what each must do, and what is of one rule alone."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from mezo.api import resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.method.rules import RULES
from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Update
from mezo.run import logbook
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout
from tests.killed import killed_in_step
from tests.log_by_formula import follows

OPTIONS = {
    "sgd": {},
    "momentum": {"lr": 1e-3, "num_perturbations": 2, "weight_decay": 0.5, "momentum": 0.8},
    "adam": {"num_perturbations": 2, "weight_decay": 0.5, "lr_schedule": "linear", "warmup_steps": 5, "beta2": 0.99},
    "adamw": {"weight_decay": 0.5, "no_decay": ("*lora_B*",), "beta1": 0.8},
    "sign": {"lr": 1e-3, "num_perturbations": 3, "weight_decay": 0.1},
    "conservative": {"lr": 5e-2},
    "fzoo": {"lr": 1e-4, "num_perturbations": 4, "weight_decay": 0.5},
    "one-sided": {"num_perturbations": 3, "weight_decay": 0.5},
    "z-score": {"lr": 1e-4, "num_perturbations": 2, "directions": 2},
    "ranks": {"lr": 5e-2, "num_perturbations": 3},
    "aligned": {"num_perturbations": 3, "weight_decay": 0.5},
    "guided": {"lr": 1e-3, "num_perturbations": 4, "weight_decay": 0.5},
    "subspace-adam": {"lr": 2e-3, "num_perturbations": 2, "directions": 2, "refresh_every": 7, "beta2": 0.95},
    "normalised": {"update_rule": "sgd", "normalise_z": True, "num_perturbations": 2},
}
each_rule = pytest.mark.parametrize("rule", OPTIONS)


def of(config, rule, **changes):
    return config.replace(**{"update_rule": rule, **OPTIONS[rule], "verify_every": 1, **changes})


def applied(rule, **fields):
    """The update rule of a name in OPTIONS, with the options it has by default."""
    return LoggedRule(RULES[OPTIONS[rule].get("update_rule", rule)](), **fields)


def log_of(config):
    return Path(config.machine.output_dir, "trajectory.jsonl")


@each_rule
def test_a_run_is_its_log_and_goes_on_from_any_line(rule, tiny_config):
    """Replay gives the bits of the run on two backends; a log cut inside a line resumes to the same bytes."""
    config = of(tiny_config, rule, steps=20)
    train(config)
    whole = log_of(config).read_bytes()
    first, records = read_trajectory(log_of(config))
    assert first["version"] == (1 if rule == "sgd" else 2)
    assert first.get("rule", {"name": "sgd"})["name"] == applied(rule).rule.name
    assert first.get("rule", {}).get("distribution", "normal") == applied(rule).rule.distribution
    assert logbook.verify(config.machine.output_dir) == follows(config.machine.output_dir) == 20
    kept = read_adapter(Path(config.machine.output_dir, "adapter"))
    for backend in (None, "reference"):
        assert same_bits(rebuild(config.machine.output_dir, "best", backend)[0], kept) is None
    last = rebuild(config.machine.output_dir, "last")[0]

    killed_in_step(17, config.machine.output_dir)
    resume(config.machine.output_dir)
    assert log_of(config).read_bytes() == whole
    assert same_bits(rebuild(config.machine.output_dir, "last")[0], last) is None
    assert any(any(record.update.coefficients) for record in records)


@each_rule
def test_the_loss_falls(rule, tiny_config):
    """200 steps of the sentiment task, from chance; a sign error climbs."""
    lr = {"momentum": 5e-3, "adam": 1e-2, "adamw": 1e-2, "sign": 3e-3, "fzoo": 1e-4, "z-score": 7e-3}.get(rule, 3e-2)
    config = of(tiny_config, rule, lr=lr, steps=200, weight_decay=0.0, no_decay=(), verify_every=-1, eval_every=200)
    result = train(config)
    records = read_trajectory(log_of(config))[1]
    losses = [(sum(r.losses.plus) + sum(r.losses.minus)) / (2 * len(r.update.seeds)) for r in records]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert result["skipped_steps"] == 0


def stepped(rule, updates, names=("a", "b"), passes=1):
    """theta and state after updates of a rule."""
    theta = PerturbedTheta(ParamLayout({name: torch.linspace(-1, 1, 100) for name in names}), [], None, rule)
    size = len(updates) // passes
    for i in range(passes):
        theta.update(updates[i * size : (i + 1) * size])
    return theta


@pytest.mark.parametrize("rule", ["momentum", "adam", "adamw", "sign"])
def test_a_skipped_step_changes_neither_theta_nor_state(rule):
    good = [Update((1, 2), (0.5, -0.1), 0.99, lr=0.1), Update((3,), (0.2,), 1.0, lr=0.1)]
    skipped = Update((9,), (0.0,), 1.0, skipped=True)
    with_it, without = (stepped(applied(rule), u) for u in ([good[0], skipped, good[1]], good))
    assert with_it.count == without.count == 2
    for a, b in zip([with_it.master, *with_it.state], [without.master, *without.state], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


@each_rule
def test_weight_decay_leaves_the_excluded_alone(rule):
    """An excluded parameter is as in a run without decay, to the bit; the others are as without an exclusion."""
    l2, decay = (0.3, 1.0) if rule == "adam" else (0.0, 0.9)
    lr = 0.1 if applied(rule).kernel(True) else None
    updates = [Update((seed,), (0.1,), decay, lr=lr) for seed in range(4)]
    plain = [dataclasses.replace(update, decay=1.0) for update in updates]
    got = stepped(applied(rule, l2=l2, no_decay=("b",)), updates).master.tensors
    without, with_decay = stepped(applied(rule), plain), stepped(applied(rule, l2=l2), updates)
    assert torch.equal(got[1], without.master.tensors[1])
    assert torch.equal(got[0], with_decay.master.tensors[0])
    assert not torch.equal(got[0], without.master.tensors[0])


def test_state_is_compared_with_the_reference():
    theta = PerturbedTheta(ParamLayout({"w": torch.ones(50)}), [], None, applied("adam"))
    theta.update([Update((1,), (0.5,), lr=0.1)], watch=True)
    assert theta.verify() is None
    theta.state[1].tensors[0][7] *= 2
    assert theta.verify().startswith("second moment of w at index 7")


def test_loading_theta_begins_anew(tiny_config):
    """As a sweep does, which runs again and again on one runtime."""
    theta = PerturbedTheta(ParamLayout({"w": torch.ones(50)}), [], None, applied("adam"))
    theta.update([Update((1,), (0.5,), lr=0.1)])
    theta.forget()
    assert theta.count == 0
    assert all(not t.any() for layout in theta.state for t in layout.tensors)


def test_a_conservative_step_keeps_the_best_of_three(tiny_config):
    config = of(tiny_config, "conservative")
    train(config)
    kept = []
    for record in read_trajectory(log_of(config))[1]:
        c = config.method.lr * record.projected_grads[0]
        kept.append(record.tried.index(min(record.tried)))
        assert record.update.coefficients == ((0.0, c, -c)[kept[-1]],)
    assert kept.count(0) > 0
    assert kept.count(1) > kept.count(2)


def test_losses_tried_are_those_of_the_steps(tiny_config):
    """The next loss of the same batch at the theta that was kept is the one that was tried."""
    config = of(tiny_config, "conservative", batch_size=48, eps=1e-4)
    train(config)
    records = read_trajectory(log_of(config))[1]
    for before, after in itertools.pairwise(records):
        middle = (after.losses.plus[0] + after.losses.minus[0]) / 2
        assert middle == pytest.approx(min(before.tried), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"momentum": 0.5},
            "--momentum 0.5 belongs to --update-rule momentum, and this run has --update-rule sgd: leave it out, or",
        ),
        (
            {"update_rule": "sign", "beta2": 0.5},
            "--beta2 0.5 belongs to --update-rule adam, adamw or subspace-adam, and this run has --update-rule sign",
        ),
        ({"update_rule": "adam", "beta1": 1.0}, "--beta1 must be at least 0 and below 1, got 1.0"),
        ({"update_rule": "adam", "adam_eps": 0.0}, "--adam-eps must be a float32 number above 0, got 0.0"),
        (
            {"refresh_every": 5},
            "--refresh-every 5 belongs to --update-rule subspace-adam, and this run has --update-rule sgd",
        ),
        ({"update_rule": "subspace-adam", "refresh_every": 0}, "--refresh-every must be at least 1, got 0"),
        (
            {"update_rule": "subspace-adam", "directions": 2, "follow_coherence": True},
            "--follow-coherence: --update-rule subspace-adam remembers each of its directions; leave it out",
        ),
        ({"no_decay": ("*",)}, "--no-decay needs --weight-decay"),
        ({"update_rule": "conservative", "num_perturbations": 2}, "--num-perturbations must be 1, got 2"),
        (
            {"update_rule": "conservative", "weight_decay": 0.1},
            "--weight-decay must be 0, got 0.1: the rule conservative keeps one of three thetas",
        ),
        ({"update_rule": "fzoo"}, "--num-perturbations must be >= 2, got 1: the rule fzoo divides"),
        ({"update_rule": "guided", "num_perturbations": 2}, "--num-perturbations must be >= 3, got 2: the rule guided"),
        (
            {"update_rule": "guided", "num_perturbations": 4, "elite_share": 0.2},
            "--elite-share must be at least 0.25, got 0.2: such a share of 4 directions is none",
        ),
        (
            {"update_rule": "guided", "num_perturbations": 4, "true_gradient": True},
            "--true-gradient: --update-rule guided measures one slope a step",
        ),
        (
            {"update_rule": "fzoo", "num_perturbations": 2, "normalise_z": True},
            "--normalise-z must be off: z of the rule fzoo",
        ),
    ],
)
def test_mistakes_are_refused(changes, message, tiny_options):
    with pytest.raises(UserError, match=message):
        Config.of(**{**tiny_options, **changes})


def test_a_pattern_that_fits_nothing_is_refused_before_anything_is_written(tiny_config):
    config = tiny_config.replace(weight_decay=0.1, no_decay=("*lora_C*",))
    with pytest.raises(UserError, match=r"--no-decay \*lora_C\* fits no trained parameter; base_model"):
        train(config)
    assert not Path(config.machine.output_dir).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first, line: first["rule"].update(name="lion"), "update rule cannot be applied"),
        (lambda first, line: first["rule"].update(distribution="cauchy"), "unknown distribution 'cauchy'"),
        (lambda first, line: line.pop("lr"), "line 2 lacks lr"),
    ],
)
def test_a_log_that_cannot_be_applied_is_refused(change, message, tiny_config):
    config = of(tiny_config, "adam", steps=2, warmup_steps=0)
    train(config)
    first, line, *rest = [json.loads(text) for text in log_of(config).read_text().splitlines()]
    change(first, line)
    log_of(config).write_text("".join(json.dumps(values) + "\n" for values in (first, line, *rest)))
    with pytest.raises(UserError, match=message):
        rebuild(config.machine.output_dir, "last")


def test_a_subspace_of_no_steps_is_refused(tiny_config):
    config = of(tiny_config, "subspace-adam", steps=2)
    train(config)
    first, *lines = log_of(config).read_text().splitlines()
    for period in (0, 1.5, "7"):
        header = json.loads(first)
        header["rule"]["refresh_every"] = period
        log_of(config).write_text("\n".join([json.dumps(header), *lines]) + "\n")
        with pytest.raises(UserError, match=r"the header is not what it must be \(rule\.refresh_every"):
            rebuild(config.machine.output_dir, "last")


def test_more_directions_than_parameters_are_refused_before_anything_is_written(tiny_config):
    config = of(tiny_config, "aligned", num_perturbations=5000)
    with pytest.raises(
        UserError, match=r"--update-rule aligned: 5000 directions a step, but .* parameters are trained"
    ):
        train(config)
    assert not Path(config.machine.output_dir).exists()
