"""What a step is made of: the schedule and clipping of its coefficients, and the noise of its projected_grad."""

import json
from pathlib import Path

import pytest
import torch

from mezo.api import train
from mezo.report.monitor import Monitor
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from tests.log_by_formula import follows


def test_schedule_and_clipping_act_on_every_step(tiny_config):
    changes = {"lr_schedule": "linear", "warmup_steps": 10, "clip": 0.2, "weight_decay": 0.5, "num_perturbations": 2}
    config = tiny_config.replace(**changes)
    result = train(config)
    records = read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[1]
    rates = [config.method.lr * (t / 10 if t < 10 else (40 - t) / 30) for t in range(40)]
    for record, lr in zip(records, rates, strict=True):
        assert record.update.decay == pytest.approx(1 - lr * 0.5, rel=1e-12)
        wanted = [lr * max(-0.2, min(0.2, g)) / 2 for g in record.projected_grads]
        assert record.update.coefficients == pytest.approx(wanted, rel=1e-12)
    clipped = [abs(g) > 0.2 for record in records for g in record.projected_grads]
    assert 0 < sum(clipped) < len(clipped)
    assert result["clipped_share"] == sum(clipped) / len(clipped)
    assert follows(config.machine.output_dir) == 40


def test_noise_is_measured_and_restores_the_copies(tiny_config, tmp_path):
    """Measuring must not touch the run: the same log with and without it. On a CPU the noise is zero."""
    quiet = tiny_config.replace(noise=False, output_dir=str(tmp_path / "quiet"))
    result, without = train(tiny_config), train(quiet)
    logs = [Path(c.machine.output_dir, "trajectory.jsonl").read_bytes() for c in (tiny_config, quiet)]
    assert logs[0] == logs[1]
    assert result["projected_grad_noise"] == 0 < result["projected_grad_rms"]
    assert "projected_grad_noise" not in without
    rows = [json.loads(line) for line in Path(tiny_config.machine.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "noise"] == [10, 20, 30, 40]


def test_noise_is_the_spread_of_losses_over_two_eps(tiny_config, monkeypatch):
    """Scores of the two copies that differ although theta is the same in both."""
    score, measuring = HFRuntime.score_pairs, []
    equalise = HFRuntime.equalise
    monkeypatch.setattr(HFRuntime, "equalise", lambda self: (measuring.append(1), equalise(self))[1])

    def noisy(self, split, indices, shares):
        ((plus, minus),) = score(self, split, indices, shares)
        if measuring:
            measuring[:] = measuring * 2 if len(measuring) < 2 else []
            plus = plus + torch.tensor([0.0, 1e-3], dtype=plus.dtype)
        return [(plus, minus)]

    monkeypatch.setattr(HFRuntime, "score_pairs", noisy)
    result = train(tiny_config.replace(steps=10))
    # about half of a thousandth on two of the four differences, over 2 eps
    assert 0.3 * 1e-3 / 2e-2 / 2 < result["projected_grad_noise"] < 1e-3 / 2e-2


def test_noise_above_a_tenth_is_warned_of(capsys):
    with Monitor([], steps=1, start=0) as monitor:
        for step, noise in ((7, 0.11), (8, 0.09)):
            monitor.instrument({"step": step, "split": "noise", "noise": noise, "projected_grad_rms": 1.0})
    shown = " ".join(capsys.readouterr().err.split())
    assert "step 7 noise 0.11 on projected_grad of 1: more than a tenth. Raise --eps" in shown
    assert "step 8" not in shown
