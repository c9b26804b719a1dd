"""A head from zeros learns by forward passes what a calibrated A lets it see; its part of LEADERBOARD.md."""

import encoder_head
import pytest
import torch
from encoder_head import Given, Row, by_gradients, cell, trained
from leaderboard_text import page

CALIBRATED, PLAIN = Row("calibrated", 32, r=4, examples=100), Row("plain", 32)


@pytest.fixture
def own():
    """Sentences that share a mean of length 30, and whose label is the sign of one direction beside it."""
    generator = torch.Generator().manual_seed(0)
    x = {
        s: torch.randn(200, 12, generator=generator) * torch.tensor([2.0, 1.5, *[0.5] * 10])
        for s in encoder_head.SPLITS
    }
    return Given({s: each + 30 * torch.eye(12)[5] for s, each in x.items()}, {s: (x[s][:, 1] > 0).long() for s in x})


def test_a_calibrated_head_learns_where_the_shared_mean_drowns_a_plain_one(own):
    found = trained(CALIBRATED, own, 6_000, 0.1, 1)
    assert found["accuracy"] > 0.9
    assert found == trained(CALIBRATED, own, 6_000, 0.1, 1) | {"seconds": found["seconds"]}
    plain = max(trained(PLAIN, own, 6_000, lr, 1)["accuracy"] for lr in (0.001, 0.01, 0.1))
    assert plain < found["accuracy"] - 0.05
    assert by_gradients(CALIBRATED, own)["accuracy"] > 0.9


def test_a_cell_is_of_other_runs_than_its_lr_and_is_shown(own, monkeypatch):
    monkeypatch.setattr(encoder_head, "LRS", (1e-9, 0.1))
    made = cell(CALIBRATED, 3_000, {1: own, 2: own}, 2)
    assert made["lr"] == 0.1
    runs = [trained(CALIBRATED, own, 3_000, 0.1, seed)["accuracy"] for seed in (1, 2)]
    assert made["accuracy"]["of"] == [sum(runs) / 2] * 2
    figures = {"accuracy": {"mean": 0.5, "std": 0.0, "of": [0.5]}}
    beside = {"encoder": {"shots": {"512": dict.fromkeys(("mezo", "adamw", "probe"), figures)}}}
    films = {"movie": {"machine": {"cpu": "a CPU", "threads": 1}, "cells": {}}}
    text = "\n".join(page(films, {}, (), ({"cells": {"c": {"3000": made}}}, beside)))
    assert f"| calibrated | {100 * made['accuracy']['mean']:.1f} (0.0) |" in text
    assert "over 2 samples of data, 2 runs each" in text
