"""--anchored-decay: weight decay towards where a run began."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mezo import MeZO
from mezo.api import resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.method.rules import RULES
from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Step, Update
from mezo.run import logbook
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, anchored_decay_, lora_init, standard_normal
from tests.log_by_formula import follows

ROUNDING = 1e-6  # of 20 float32 updates of numbers below 1
RULES_OF = {"sgd": {}, "momentum": {"update_rule": "momentum", "lr": 1e-3}, "sparing": {"no_decay": ("*q_proj*",)}}


@pytest.fixture
def config(tiny_config):
    return tiny_config.replace(
        steps=20, weight_decay=5.0, anchored_decay=True, num_perturbations=2, verify_every=1, eval_test=False
    )


def log_of(config):
    return Path(config.machine.output_dir, "trajectory.jsonl")


@pytest.mark.parametrize("decay", [0.9, 0.999999, 0.25, 1.0])
def test_it_is_the_formula_in_float32(decay):
    generator = torch.Generator().manual_seed(0)
    theta, start = torch.randn(2, 3, 41, generator=generator)
    d, t, s = np.float32(decay), theta.numpy().copy(), start.numpy()
    expected = t * d + s * np.float32(1 - d)
    anchored_decay_([theta], [start], decay)
    assert np.array_equal(theta.numpy(), expected if decay != 1 else t)


@pytest.mark.parametrize(
    "start",
    [[torch.zeros(3)], [torch.zeros(2).double()], [torch.zeros(2, device="meta")], [], [torch.zeros(2)] * 2],
    ids=["shape", "dtype", "device", "none", "two"],
)
def test_a_start_of_another_kind_is_refused(start):
    theta = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"parameter 0 must be float32 of one shape and|argument 2 is (shorter|longer)"
    ):
        anchored_decay_([theta], start, 0.5)
    assert theta.tolist() == [1, 1]


@pytest.mark.parametrize("rule", RULES_OF)
def test_a_run_is_its_log_and_goes_on_from_any_line(rule, config, tmp_path):
    config = config.replace(**RULES_OF[rule])
    train(config)
    first, _ = read_trajectory(log_of(config))
    assert first["version"] == 2
    assert first["rule"]["anchored"] is True
    assert logbook.verify(config.machine.output_dir) == follows(config.machine.output_dir) == 20
    kept = read_adapter(Path(config.machine.output_dir, "adapter"))
    for backend in (None, "reference"):
        assert same_bits(rebuild(config.machine.output_dir, "best", backend)[0], kept) is None
    parted = config.replace(output_dir=str(tmp_path / "parted"))
    assert train(parted, until=7) is None
    resume(parted.machine.output_dir)
    assert log_of(parted).read_bytes() == log_of(config).read_bytes()


def test_theta_is_what_theory_says(config):
    """theta_T - theta_0 = - sum_t (prod_{s > t} decay_s) c_t z_t, in float64; lora_A begins at the run's own draw."""
    train(config)
    first, records = read_trajectory(log_of(config))
    theta, _, _ = rebuild(config.machine.output_dir, "last")
    for name, shape in first["shapes"].items():
        start = lora_init(0, name, tuple(shape)) if "lora_A" in name else torch.zeros(shape)
        moved = torch.zeros(shape, dtype=torch.float64)
        for record in records:
            moved *= record.update.decay
            for seed, c in zip(record.update.seeds, record.update.coefficients, strict=True):
                moved -= c * standard_normal(seed, name, 0, start.numel()).double().view(*shape)
        assert moved.abs().max() > 100 * ROUNDING
        assert torch.allclose(theta[name].double(), start.double() + moved, atol=ROUNDING, rtol=0)


def test_on_a_linear_loss_it_settles_where_decay_balances_the_gradient():
    """E theta = theta_0 - g / weight_decay: within 4 standard errors, of blocks far longer than the memory of decay."""
    g, start = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64), torch.tensor([3.0, -2.0, 0.5])
    w = torch.nn.Parameter(start.clone())
    optimizer = MeZO([w], lr=0.1, weight_decay=1.0, anchored_decay=True, eps=1e-2)
    seen = []
    for _ in range(2200):
        optimizer.step(lambda: (w.double() * g).sum())
        seen.append(w.detach().clone())
    blocks = torch.stack(seen[200:]).double().view(20, 100, 3).mean(1)
    error = blocks.std(0) / 20**0.5
    assert ((blocks.mean(0) - (start - g)).abs() < 4 * error).all()
    assert ((start - g).abs() > 8 * error).all(), "zero, where plain decay would draw it, is told apart"


def test_where_theta_begins_at_zero_it_is_plain_decay(tiny_options, tmp_path):
    """--tuning lora-b: the same losses and theta; nothing is held beside theta."""
    options = tiny_options | {"tuning": "lora-b", "weight_decay": 5.0, "steps": 12}
    thetas = []
    for anchored in (True, False):
        directory = str(tmp_path / str(anchored))
        train(Config.of(**options | {"anchored_decay": anchored, "output_dir": directory}))
        thetas.append(rebuild(directory)[0])
    assert same_bits(*thetas) is None
    zero = ParamLayout({"w": torch.zeros(8)})
    assert not PerturbedTheta(zero, [], None, LoggedRule(anchored=True)).start


def test_many_updates_to_a_pass_are_those_one_by_one():
    updates = [Update((2 * t, 2 * t + 1), (0.1, -0.2), 0.9, lr=0.1) for t in range(5)]
    updates[2] = Update((9,), (0.0,), skipped=True)
    for rule in ("sgd", "momentum"):
        made = []
        for passes in (1, 5):
            theta = ParamLayout({"a": torch.linspace(-1, 1, 100), "b": torch.zeros(50), "c": torch.ones(9)})
            copies = [theta.like([torch.empty_like(t) for t in theta.tensors]) for _ in range(2)]
            held = PerturbedTheta(theta, [copies], None, LoggedRule(RULES[rule](), no_decay=("c",), anchored=True))
            for i in range(passes):
                part = updates if passes == 1 else [updates[i]]
                held.update(part, Step([77], 0.1) if i == passes - 1 else None, watch=True)
                assert held.verify() is None
            made.append([t for one in (theta, *copies, *held.state) for t in one.tensors])
        assert all(map(torch.equal, *made))


def test_loading_theta_draws_to_that_theta():
    """As an engine and a prepared runtime do, which hold zeros before theta_0 comes."""
    layout = ParamLayout({"w": torch.zeros(4)})
    theta = PerturbedTheta(layout, [], None, LoggedRule(anchored=True))
    layout.tensors[0].copy_(torch.ones(4))
    theta.forget()
    layout.tensors[0].fill_(3.0)
    theta.update([Update((1,), (0.0,), 0.5)])
    assert torch.equal(layout.tensors[0], torch.full((4,), 2.0))


def test_a_planted_difference_is_found():
    layout = ParamLayout({"w": torch.ones(40)})
    theta = PerturbedTheta(layout, [], None, LoggedRule(anchored=True))
    theta.update([Update((1,), (0.5,), 0.5)], watch=True)
    layout.tensors[0][7] += 1
    assert theta.verify().startswith("theta of w at index 7")


def test_the_optimizer_goes_on_from_its_state():
    def run(steps, state=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        optimizer = MeZO(model.named_parameters(), lr=0.05, weight_decay=2.0, anchored_decay=True)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.step(lambda: model(torch.ones(2, 6)).square().sum())
        return optimizer.state_dict(), [p.detach().clone() for p in model.parameters()]

    whole, half = run(8), run(4)
    assert all(map(torch.equal, whole[1], run(4, half[0])[1]))
    for state in half[0]["state"].values():
        del state["start"]
    with pytest.raises(ValueError, match="the state has no start"):
        run(4, half[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.0}, "--anchored-decay needs --weight-decay: give it, or leave both"),
        ({"update_rule": "adam"}, "--anchored-decay: --update-rule adam has decay in the gradient, towards zero; use"),
    ],
)
def test_what_it_cannot_go_with_is_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        config.replace(**changes)
    with pytest.raises(ValueError, match="anchored_decay: adam has decay in the gradient"):
        MeZO([torch.nn.Parameter(torch.ones(2))], lr=1e-3, weight_decay=0.1, rule="adam", anchored_decay=True)


def test_a_log_that_says_otherwise_than_the_configuration_is_refused(config):
    train(config)
    path = RunDirectory(Path(config.machine.output_dir)).config
    path.write_text(json.dumps(json.loads(path.read_text()) | {"anchored_decay": False}))
    with pytest.raises(UserError, match=r"rule of the header is not what config\.json says"):
        rebuild(config.machine.output_dir)
