"""What the instruments say of an estimate, against what it is; and that they leave a run alone."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mezo.api import train
from mezo.config import Config
from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.objectives import OBJECTIVES, cross_entropy
from mezo.method.step import Update
from mezo.report.monitor import Monitor
from mezo.run.trajectory import StepRecord, read_trajectory
from mezo.training.instruments import (
    against_gradient,
    coherence,
    realised_perturbation,
    spread_over_batch,
    spread_over_perturbations,
)
from mezo_kernels import standard_normal
from tests.tiny_models import LAST_LAYER


def rows(config, split):
    lines = Path(config.machine.output_dir, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def log_of(config):
    return Path(config.machine.output_dir, "trajectory.jsonl").read_bytes()


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch_size": 3}, {"layers_to_transform": (1, 2)}, {"objective": "lm_cross_entropy"}],
    ids=["last layer", "micro-batches", "two layers", "lm_cross_entropy"],
)
def test_they_leave_the_run_alone(tiny_config, tmp_path, options):
    """The same log, byte for byte, with all instruments and with none."""
    config = tiny_config.replace(num_perturbations=2, true_gradient=True, steps=20, **options)
    plain = config.replace(noise=False, true_gradient=False, output_dir=str(tmp_path / "plain"))
    result, without = train(config), train(plain)
    assert log_of(config) == log_of(plain)
    assert [row["step"] for row in rows(config, "spread")] == [10, 20]
    assert [row["step"] for row in rows(config, "gradient")] == [0, 10, 20]
    found = {"projected_grad_spread", "projected_grad_batch_error", "perturbation_error", "gradient_cosine"}
    assert found <= result.keys()
    assert not found & without.keys()


def test_the_estimate_of_a_run_points_along_the_gradient(tiny_config):
    """Many directions in few dimensions: the cosine is what theory expects, and each projected_grad is z . grad."""
    few = {"target_modules": ("q_proj",), "r": 1, "num_perturbations": 128, "batch_size": 48, "eps": 1e-3}
    config = tiny_config.replace(steps=2, eval_every=2, true_gradient=True, **few)
    result = train(config)
    row = rows(config, "gradient")[-1]
    assert row["expected_cosine"] == math.sqrt(128 / (128 + 64 + 1))
    assert row["cosine"] == pytest.approx(row["expected_cosine"], abs=0.15)
    assert row["projected_grad_error"] < 5e-3
    assert result["gradient_norm"] > 0
    records = read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[1]
    assert row["gradient_norm"] == pytest.approx(torch.tensor(records[1].projected_grads).std().item(), rel=0.5)


def test_spread_over_perturbations_is_the_standard_deviation_of_the_log(tiny_config):
    config = tiny_config.replace(num_perturbations=4, steps=10)
    train(config)
    records = read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[1]
    deviations = [torch.tensor(record.projected_grads, dtype=torch.float64).std() for record in records]
    expected = torch.stack(deviations).square().mean().sqrt().item()
    assert rows(config, "spread")[0]["over_perturbations"] == pytest.approx(expected, rel=1e-12)
    skipped = dataclasses.replace(records[0], update=Update.skip(records[0].update.seeds))
    assert spread_over_perturbations([skipped]) is None
    alone = StepRecord(0, Update((1,), (0.0,)), Losses((1.0,), (1.0,)), (1.0,))
    assert spread_over_perturbations([alone]) is None


def test_spread_over_the_batch_foretells_how_batches_differ():
    """The standard error from one batch, against the standard deviation of projected_grad over many batches."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(4000, 2, generator=generator, dtype=torch.float64) for _ in "+-"]
    labels = torch.randint(2, (4000,), generator=generator)
    batches = torch.arange(4000).view(-1, 16)
    losses = [[cross_entropy(s[batch], labels[batch]).item() for s in scores] for batch in batches]
    observed = (torch.tensor(losses).diff(dim=1) / 2e-2).std().item()
    one_each = [[cross_entropy(s[[i]], labels[[i]]).item() for s in scores] for i in range(1600)]
    grads = torch.tensor(one_each, dtype=torch.float64).diff(dim=1).flatten() / 2e-2
    assert spread_over_batch(grads.split(16), 16) == pytest.approx(observed, rel=0.1)
    assert spread_over_batch(grads.split(8), 16) == pytest.approx(observed, rel=0.1)
    assert spread_over_batch([], 16) is None


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_coherence_is_the_share_of_the_gradient_that_examples_agree_on(shared):
    """Along many z, of gradients drawn with a common part: against the gradients themselves."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gradients = math.sqrt(shared) * draw(50) + math.sqrt(1 - shared) * draw(32, 50)
    norm = gradients.square().sum(1).mean()
    pairs = (gradients.sum(0).square().sum() - 32 * norm) / (32 * 31)
    found = coherence([gradients @ draw(50) for _ in range(4000)])
    assert found == pytest.approx((pairs / norm).item(), abs=0.02)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_is_a_mean_over_examples(name):
    """What the spread over a batch relies on."""
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(9, 3, generator=generator), torch.randint(3, (9,), generator=generator)
    single = [OBJECTIVES[name](scores[i : i + 1], labels[i : i + 1]).item() for i in range(9)]
    assert sum(single) / 9 == pytest.approx(OBJECTIVES[name](scores, labels).item(), rel=1e-12)


def test_rounding_takes_a_small_perturbation_from_a_large_weight():
    theta = {"w": torch.full((1000,), 3.0)}
    exact, coarse, lost = (
        realised_perturbation(theta, dtype, 5, eps)
        for dtype, eps in ((torch.float32, 1e-2), (torch.bfloat16, 1e-2), (torch.bfloat16, 1e-5))
    )
    assert exact["perturbation_error"] < 1e-4
    assert exact["perturbation_cosine"] == pytest.approx(1, abs=1e-8)
    assert 0.2 < coarse["perturbation_error"] < 1
    assert 0.5 < coarse["perturbation_cosine"] < 0.99
    assert lost == {"perturbation_error": 1.0, "perturbation_cosine": 0.0}


def test_a_run_in_bfloat16_says_what_rounding_takes(tiny_config):
    result = train(tiny_config.replace(dtype="bfloat16", steps=10))
    assert 1e-3 < result["perturbation_error"] < 0.2
    assert 0.95 < result["perturbation_cosine"] < 1


def test_a_lost_perturbation_is_warned_of(capsys):
    with Monitor([], steps=1, start=0) as monitor:
        for step, error in ((7, 0.8), (8, 0.1)):
            row = {"step": step, "split": "spread", "perturbation_error": error, "perturbation_cosine": 0.6}
            monitor.instrument(row)
    shown = " ".join(capsys.readouterr().err.split())
    assert "step 7 spread rounding to the base's dtype changes a perturbation by 80 % (cosine 0.600)." in shown
    assert "step 8" not in shown


def test_curves_of_the_instruments_are_in_tensorboard(tiny_config):
    config = tiny_config.replace(num_perturbations=2, true_gradient=True, steps=10)
    train(config)
    events = EventAccumulator(str(Path(config.machine.output_dir, "tensorboard")))
    events.Reload()
    names = ("projected_grad_noise", "projected_grad_spread", "projected_grad_batch_error", "perturbation_error",
             "perturbation_cosine", "gradient_cosine", "gradient_norm", "projected_grad_error")  # fmt: skip
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    (row,) = rows(config, "spread")
    (point,) = events.Scalars("train/projected_grad_batch_error")
    assert (point.step, point.value) == (10, pytest.approx(row["over_batch"], rel=1e-6))


def test_the_true_gradient_of_two_directions_is_their_combination():
    gradient = {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([[3.0]])}
    z = [[standard_normal(seed, name, 0, part.numel()) for name, part in gradient.items()] for seed in (1, 2)]
    flat, full = [torch.cat(parts).double() for parts in z], torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    found = against_gradient([1, 2], [2.0, -1.0], [gradient])
    estimate = (2 * flat[0] - flat[1]) / 2
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(estimate, full, dim=0).item(), rel=1e-6)
    slopes = torch.stack(flat) @ full
    error = (torch.tensor([2.0, -1.0]) - slopes).square().mean().sqrt() / slopes.square().mean().sqrt()
    assert found["projected_grad_error"] == pytest.approx(error.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "sglang"}, "--true-gradient needs autograd in this process: use it with --runtime hf"),
        ({"objective": "accuracy"}, "--true-gradient: accuracy has no gradient; leave it out"),
    ],
)
def test_the_true_gradient_is_refused_where_there_is_none(options, message):
    with pytest.raises(UserError, match=message):
        Config.of(model="m", output_dir="o", task="sst2", true_gradient=True, **options)


def test_gradient_is_of_the_model_itself(tiny_config):
    """Every layer adapted, no cache: autograd through PEFT's own forward pass gives the same."""
    everywhere = {"target_modules": LAST_LAYER["llama"], "layers_to_transform": (), "trunk_cache": "off"}
    config = tiny_config.replace(steps=1, true_gradient=True, **everywhere)
    train(config)
    assert rows(config, "gradient")[-1]["projected_grad_error"] < 0.1
