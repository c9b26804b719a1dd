"""Runs by fzoo and along normalised z: what they score, count and log, beside the list that holds for every rule."""

import json
import math
from pathlib import Path

import pytest
import torch

from mezo.api import train
from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.step import Step, Update
from mezo.models.load import load_tokenizer
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.studies import tune
from mezo.tasks import load_splits
from mezo.training.measurement import Measurement
from mezo.training.ranks import Ranks
from mezo_kernels import ParamLayout, lora_init, perturb_, root_mean_square
from tests.log_by_formula import follows

N, EPS = 4, 1e-2


@pytest.fixture
def config(tiny_config):
    """Ten steps of fzoo."""
    return tiny_config.replace(
        update_rule="fzoo", num_perturbations=N, lr=1e-4, steps=10, eps=EPS, verify_every=1, noise=False
    )


@pytest.fixture
def runtime(config):
    """At a theta that has an effect."""
    made, splits = HFRuntime(*config.for_runtime), load_splits(config, load_tokenizer(config.model.base))
    made.prepare(splits)
    made.load(noisy(made))
    return made


def noisy(runtime):
    return {name: 0.3 * lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()}


def records_of(config):
    return read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[1]


def test_a_pair_is_theta_plus_eps_u_and_theta_itself(runtime):
    batch = [0, 7, 12]
    runtime.perturb(Step([2**63 + 5], EPS))
    ((plus, here),) = runtime.score_pairs("train", batch)
    assert torch.equal(here, runtime.score("train", batch))
    moved = noisy(runtime)
    perturb_(ParamLayout(moved), EPS, 2**63 + 5, distribution="rademacher")
    runtime.load(moved)
    assert torch.equal(plus, runtime.score("train", batch))
    assert not torch.equal(plus, here)


def test_theta_is_scored_once_a_step(runtime):
    """Also in further calls and parts of a batch; anew after an update, and as often as noise is measured."""
    scored = []
    for seeds, batch in (([1], [0, 1]), ([2], [0, 1]), ([3], [0, 1]), ([3], [2, 3])):
        runtime.perturb(Step(seeds, EPS))
        before = runtime.tokens.scored
        runtime.score_pairs("train", batch)
        scored.append(
            (runtime.tokens.scored - before) / sum(len(r.ids) for i in batch for r in runtime.scorer.rows["train"][i])
        )
    assert scored == [2, 1, 1, 2]
    runtime.equalise()
    before = runtime.tokens.scored
    runtime.score_pairs("train", [0, 1])
    assert runtime.tokens.scored - before == 2 * sum(
        len(r.ids) for i in (0, 1) for r in runtime.scorer.rows["train"][i]
    )


def test_n_perturbations_cost_n_plus_1_forward_passes(config, tmp_path):
    """Of the tokens that two-sided steps score; micro-batches change nothing but rounding."""
    scored = []
    for i, changes in enumerate(({}, {"micro_batch_size": 3}, {"update_rule": "sgd", "num_perturbations": 1})):
        own = config.replace(output_dir=str(tmp_path / str(i)), **changes)
        scored.append(train(own)["tokens_scored"])
    assert scored[0] == scored[1] == scored[2] * (N + 1) / 2
    whole, parts = (records_of(config.replace(output_dir=str(tmp_path / i)))[0] for i in "01")
    assert parts.losses.plus == pytest.approx(whole.losses.plus, abs=1e-6)
    assert parts.losses.minus == pytest.approx(whole.losses.minus, abs=1e-6)


def test_the_log_holds_the_loss_of_theta_and_the_deviation_is_of_the_others(config):
    train(config)
    for record in records_of(config):
        plus, here = torch.tensor(record.losses.plus, dtype=torch.float64), record.losses.minus[0]
        assert record.losses.minus == (here,) * N
        assert record.projected_grads == pytest.approx(((plus - here) / EPS).tolist(), rel=1e-12)
        expected = config.method.lr / N * torch.tensor(record.projected_grads, dtype=torch.float64) / plus.std()
        assert record.update.coefficients == pytest.approx(expected.tolist(), rel=1e-9)
    assert follows(config.machine.output_dir) == 10


def test_a_flat_batch_changes_nothing(config):
    """The accuracy hardly ever differs between perturbations: no division by zero, no decay either."""
    config = config.replace(objective="accuracy", weight_decay=0.5, eps=1e-5)
    result = train(config)
    records = records_of(config)
    flat = [record for record in records if len(set(record.losses.plus)) == 1]
    assert len(flat) == result["zero_steps"] >= 9
    assert result["skipped_steps"] == 0
    assert all(record.update.coefficients == (0.0,) * N and record.update.decay == 1 for record in flat)


@pytest.mark.parametrize(("losses", "zero"), [((0.1,) * 3, True), ((0.1, 0.1, math.nextafter(0.1, 1)), False)])
def test_only_equal_losses_are_flat(config, losses, zero):
    """0.1 + 0.1 + 0.1 is not 3 * 0.1: a naive deviation of equal losses is not zero."""
    update = config.method.rule.plan((1, 2, 3), (1.0, -1.0, 2.0), Losses(losses, losses), config.method.lr)
    assert (update.coefficients == (0.0,) * 3) is zero
    assert not update.skipped


def test_losses_that_are_not_finite_skip_the_step(config):
    losses = Losses((1.0, math.nan), (0.0, 0.0))
    assert config.method.rule.plan((1, 2), (1.0, math.nan), losses, config.method.lr) == Update.skip((1, 2))


def test_verify_looks_at_theta_s_own_copy(runtime):
    runtime.perturb(Step([5], EPS), watch=True)
    assert runtime.verify() is None
    runtime.minus.tensors[0].view(torch.int32)[0, 3] ^= 1
    assert runtime.verify().startswith("minus of ")


def test_a_sweep_needs_its_grid(config):
    with pytest.raises(UserError, match=r"--update-rule fzoo: .*give --grid-lr and --grid-eps"):
        tune.tune(config.replace(output_dir=config.machine.output_dir + "-sweep"))


@pytest.mark.parametrize("changes", [{}, {"update_rule": "sgd", "normalise_z": True}])
def test_the_instruments_know_what_z_is(config, changes):
    """Against autograd: close along one-sided and along normalised z, and what float32 leaves of them is all."""
    config = config.replace(
        **changes, noise=True, true_gradient=True, eps=1e-3, lr=1e-5, batch_size=48, steps=2, eval_every=1
    )
    result = train(config)
    assert result["projected_grad_error"] < 0.05
    assert result["perturbation_error"] < 1e-3
    rows = [json.loads(line) for line in Path(config.machine.output_dir, "metrics.jsonl").read_text().splitlines()]
    size = sum(
        a * b for a, b in read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[0]["shapes"].values()
    )
    expected = {row["expected_cosine"] for row in rows if row["split"] == "gradient"}
    assert list(expected) == [pytest.approx(math.sqrt(N / (N + size - 1)), rel=1e-12)] * len(expected)


def test_normalised_coefficients_are_over_the_length_of_z(config):
    """lr projected_grad / (n r) with r of the whole z, and the perturbation is eps / r of it."""
    config = config.replace(update_rule="sgd", normalise_z=True)
    train(config)
    first, records = read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))
    assert first["rule"]["normalised"] is True
    for record in records:
        update = record.update
        for seed, grad, coefficient in zip(update.seeds, record.projected_grads, update.coefficients, strict=True):
            assert coefficient == config.method.lr * grad / N / root_mean_square(first["shapes"], seed)


def test_normalised_perturbations_have_one_length(config):
    """|theta_plus - theta_minus| = 2 eps sqrt(d), whatever the seed; plain z has another length each time."""
    config = config.replace(update_rule="sgd", normalise_z=True)
    made, splits = HFRuntime(*config.for_runtime), load_splits(config, load_tokenizer(config.model.base))
    made.prepare(splits)
    made.load(noisy(made))
    measurement, one = (
        Measurement(config.method, config.machine, made, splits["train"], {}, Ranks()),
        2 * EPS * math.sqrt(made.master.n_elements),
    )

    def length():
        pairs = zip(made.plus.tensors, made.minus.tensors, strict=True)
        return math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))

    for seed in (1, 2, 3):
        made.perturb(Step([seed], [EPS / measurement.norm(seed)]))
        assert length() == pytest.approx(one, rel=1e-5)
        made.perturb(Step([seed], EPS))
        assert length() != pytest.approx(one, rel=1e-4)
