"""Runs by the rule guided: copies along a contrast of directions, what is scored and logged, what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mezo.api import train
from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.step import Step, Update
from mezo.report.leaderboard import rows_scored
from mezo.run import logbook
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.theta import PerturbedTheta
from mezo.studies import tune
from mezo_kernels import ParamLayout, standard_normal
from tests.log_by_formula import follows

N = 5
ALONG = Step((7, 8, 2**64 - 1), (0.1, 0.2, 0.3), 4, (1.0, -0.5, -0.5))


@pytest.fixture
def config(tiny_config):
    """Ten steps of five directions, of which two are the elite."""
    options = {"update_rule": "guided", "num_perturbations": N, "elite_share": 0.4, "lr": 1e-3, "noise": False}
    return tiny_config.replace(**options, steps=10, verify_every=1)


def log_of(config):
    return Path(config.machine.output_dir, "trajectory.jsonl")


def perturbed(dtype, backend=None, **options):
    """Theta of 150 numbers in two parameters, and room for two pairs of copies."""
    master = ParamLayout({"a": torch.linspace(-1, 1, 100), "b": torch.full((50,), 3.0)})
    copies = [master.like([torch.full_like(t, torch.nan, dtype=dtype) for t in master.tensors]) for _ in range(4)]
    return PerturbedTheta(master, list(zip(copies[:2], copies[2:], strict=True)), backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_along_several_directions_are_single_roundings_of_the_sum(dtype):
    """In float32 from theta on, in the order of the seeds; both backends; theta stays as it is."""
    for backend in (None, "reference"):
        theta = perturbed(dtype, backend)
        before = [t.clone() for t in theta.master.tensors]
        theta.perturb(ALONG)
        assert all(map(torch.equal, theta.master.tensors, before))
        for layout, sign in zip(theta.pairs[0], (1.0, -1.0), strict=True):
            for name, start, found in zip(layout.names, before, layout.tensors, strict=True):
                for seed, eps, weight in zip(ALONG.seeds, ALONG.eps, ALONG.weights, strict=True):
                    start = start + torch.tensor(sign * eps * weight) * standard_normal(seed, name, 0, len(start))
                assert torch.equal(found, start.to(dtype))
        assert theta.pairs[1][0].tensors[0].isnan().all(), "one pair alone"


def test_they_follow_updates_are_restored_and_compared_with_the_reference():
    theta, other = perturbed(torch.float32, watched=60), perturbed(torch.float32)
    update = Update((1, 2), (0.5, -0.1), 0.9)
    theta.update([update], ALONG, watch=True)
    other.update([update])
    other.perturb(ALONG)
    assert all(map(torch.equal, theta.pairs[0][1].tensors, other.pairs[0][1].tensors))
    assert theta.verify() is None
    kept = [t.clone() for t in theta.pairs[0][0].tensors]
    theta.show(theta.pairs[0])
    theta.restore()
    assert all(map(torch.equal, theta.pairs[0][0].tensors, kept))
    theta.pairs[0][1].tensors[0].view(torch.int32)[3] ^= 1
    assert theta.verify().startswith("minus of a at index 3")


def test_a_step_along_several_directions_has_a_weight_for_each():
    with pytest.raises(ValueError, match="weights must be one a seed, or none: got 1 for 2 seeds"):
        Step([1, 2], 0.1, weights=[1.0])


def test_n_directions_cost_n_plus_2_forward_passes(config, tmp_path):
    """Of the tokens that two-sided steps score, and as the leaderboard counts; micro-batches change rounding alone."""
    scored = []
    for i, changes in enumerate(({}, {"micro_batch_size": 3}, {"update_rule": "sgd", "num_perturbations": 1})):
        own = config.replace(output_dir=str(tmp_path / str(i)), **changes)
        scored.append((train(own)["tokens_scored"], rows_scored(own)))
    (whole, rows), (parts, _), (plain, plain_rows) = scored
    assert whole == parts == plain * (N + 2) / 2
    assert rows == plain_rows * (N + 2) / 2
    one, other = (read_trajectory(tmp_path / i / "trajectory.jsonl")[1][0] for i in "01")
    assert other.tried == pytest.approx(one.tried, abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"normalise_z": True}, {"clip": 0.05, "max_step_ratio": 2.0}])
def test_the_log_follows_from_the_formula(config, changes):
    config = config.replace(**changes)
    train(config)
    assert follows(config.machine.output_dir) == logbook.verify(config.machine.output_dir) == 10
    records = read_trajectory(log_of(config))[1]
    assert all(len(record.tried) == 2 and record.tried[0] != record.tried[1] for record in records)


def test_the_slope_is_that_of_the_two_losses_along_the_contrast(config, tmp_path):
    """Which are scored anew, not taken from those along the z."""
    first = config.replace(steps=1, eval_every=1, output_dir=str(tmp_path / "one"))
    train(first)
    (record,) = read_trajectory(log_of(first))[1]
    assert not set(record.tried) & set(record.losses.plus)
    slope = (record.tried[0] - record.tried[1]) / (2 * config.method.eps)
    weights = config.method.rule.contrast(record.losses)
    assert record.update.coefficients == pytest.approx([1e-3 * slope * w for w in weights], rel=1e-12)


def test_a_line_that_does_not_follow_is_refused(config):
    train(config)
    first, *lines = log_of(config).read_text().splitlines()
    for change in (
        lambda line: line.update(tried=[]),
        lambda line: line.update(tried=line["tried"][::-1]),
        lambda line: line.update(loss_minus=[line["loss_plus"][0]] * N),
    ):
        line = json.loads(lines[3])
        change(line)
        log_of(config).write_text("\n".join([first, *lines[:3], json.dumps(line), *lines[4:]]) + "\n")
        with pytest.raises(UserError, match="line 5: the estimates or coefficients do not follow"):
            logbook.verify(config.machine.output_dir)


def test_losses_that_are_not_finite_skip_the_step(config):
    rule, losses = config.method.rule, Losses((1.0, float("nan"), 2.0), (0.0,) * 3).against_mean()
    assert rule.plan((1, 2, 3), rule.slopes((), (), 0.1), losses, 0.1) == Update.skip((1, 2, 3))
    losses = dataclasses.replace(losses, plus=(1.0, 3.0, 2.0), minus=(2.0,) * 3)
    assert rule.plan((1, 2, 3), rule.slopes((), (float("inf"), 1.0), 0.1), losses, 0.1).skipped


def test_instruments_read_the_pair_along_the_contrast(config):
    """The spread over a batch is that of the slope along v, not of the directions that were scored on one side."""
    config = config.replace(noise=True, steps=4, eval_every=2, batch_size=8)
    train(config)
    rows = [json.loads(line) for line in Path(config.machine.output_dir, "metrics.jsonl").read_text().splitlines()]
    spread = [row for row in rows if row["split"] == "spread"]
    assert len(spread) == 2
    assert all(row["over_batch"] > 0 and row["coherence"] <= 1 for row in spread)
    assert len([row for row in rows if row["split"] == "noise"]) == 2


def test_a_sweep_needs_its_grid(config):
    with pytest.raises(UserError, match=r"--update-rule guided: .*give --grid-lr and --grid-eps"):
        tune.tune(config.replace(output_dir=config.machine.output_dir + "-sweep"))
