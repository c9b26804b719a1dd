"""Saved states: checked before anything is written, matched by name, of every version."""

import copy
from pathlib import Path

import pytest
import torch

from mezo import MeZO

GOLDEN = Path(__file__).parents[1] / "golden" / "optimizer-states.pt"


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).to(dtype)


def train(model, optimizer, steps):
    x = torch.linspace(-1, 1, 12).view(4, 3).to(model.weight.dtype)
    for _ in range(steps):
        optimizer.step(lambda: model(x).float().square().mean())


def theta(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "unnamed"])
def test_a_state_of_the_first_version_goes_on_with_its_z(prefix):
    """Written when counts stood beside the groups, and the names of wrappers were part of those that decide z."""
    golden, model = torch.load(GOLDEN)[prefix], make(torch.bfloat16)
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    optimizer = MeZO(model.parameters() if prefix == "unnamed" else named, lr=1.0, rule="momentum")
    optimizer.load_state_dict(golden["state"])
    assert (optimizer.steps, optimizer.seed) == (3, 11)
    train(model, optimizer, 3)
    assert same(theta(model), golden["theta"])


def broken_shape(state):
    state["state"][1]["master"] = torch.zeros(5)


def broken_dtype(state):
    state["state"][1]["momentum_buffer"] = state["state"][1]["momentum_buffer"].bfloat16()


def without_moment(state):
    del state["state"][1]["momentum_buffer"]


def other_names(state):
    state["param_groups"][0]["param_names"] = ["weight", "offset"]


def bad_option(state):
    state["param_groups"][0]["seed"] = -1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_shape, r"bias: master must be \(2,\) of torch.float32, got \(5,\)"),
        (broken_dtype, "bias: momentum_buffer must be .* got .*bfloat16"),
        (without_moment, "bias: the state has no momentum_buffer"),
        (other_names, "the optimizer lacks 1 parameters of the other: offset"),
        (bad_option, "seed must be in"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(damage, message):
    model, other = make(), make()
    optimizer = MeZO(model.named_parameters(), lr=0.1, rule="momentum")
    train(model, optimizer, 2)
    fresh = MeZO(other.named_parameters(), lr=0.1, rule="momentum")
    state, before = copy.deepcopy(optimizer.state_dict()), theta(other)
    damage(state)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state)
    assert same(theta(other), before)
    assert fresh.steps == 0


def test_parameters_are_known_by_name_in_another_order():
    model, other = make(), make()
    optimizer = MeZO(model.named_parameters(), lr=0.1, rule="momentum")
    train(model, optimizer, 2)
    fresh = MeZO(reversed(list(other.named_parameters("module"))), lr=0.1, rule="momentum")
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(other, fresh, 2)
    assert same(theta(model), theta(other))


def test_z_of_unnamed_parameters_goes_on_under_names():
    model, other = make(), make()
    optimizer, fresh = MeZO(model.parameters(), lr=0.1), MeZO(other.named_parameters(), lr=0.1)
    train(model, optimizer, 2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(other, fresh, 2)
    assert same(theta(model), theta(other))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_carry_all_of_it(flatten, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = make(), make()
    optimizer = MeZO(model.named_parameters(), lr=0.1, rule="momentum", seed=7)
    train(model, optimizer, 2)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    fresh = MeZO(other.named_parameters(), lr=0.5, rule="momentum")
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh, options=options), strict=True))
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
    assert (fresh.steps, fresh.seed, fresh.projected_grads) == (2, 7, optimizer.projected_grads)
    train(model, optimizer, 2)
    train(other, fresh, 2)
    assert same(theta(model), theta(other))
