"""Objectives and metrics against values computed by hand."""

import math

import pytest
import torch

from mezo.method.objectives import (
    OBJECTIVES,
    cross_entropy,
    evaluate,
    lm_cross_entropy,
    mixture,
    negative_accuracy,
    predictions,
    standardised,
)

INF = float("inf")


def test_cross_entropy_is_the_log_ratio_of_the_options():
    scores = torch.tensor([[math.log(0.1), math.log(0.3)], [math.log(0.2), math.log(0.2)]], dtype=torch.float64)
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert cross_entropy(scores, torch.tensor([1, 0])).item() == pytest.approx(expected, rel=1e-15)


def test_padding_options_take_no_probability():
    padded = torch.tensor([[-1.0, -2.0, -INF], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    expected = (math.log(1 + math.exp(-1)) + math.log(3)) / 2
    assert cross_entropy(padded, torch.tensor([0, 2])).item() == pytest.approx(expected, rel=1e-15)


def test_lm_cross_entropy_sees_the_right_option_only():
    scores = torch.tensor([[-1.5, 7.0, -INF], [-9.0, -9.0, -2.5]], dtype=torch.float64)
    assert lm_cross_entropy(scores, torch.tensor([0, 2])).item() == 2.0


def test_negative_accuracy_counts_the_best_option():
    scores = torch.tensor([[-1.0, -2.0, -INF], [-3.0, -2.0, -1.0], [-1.0, -3.0, -2.0], [-1.0, -2.0, -3.0]])
    assert negative_accuracy(scores, torch.tensor([0, 2, 1, 1])).item() == -0.5


def test_of_equal_scores_the_first_is_predicted():
    scores = torch.zeros(3, 50)
    scores[1, 7:9] = 1.0
    scores[2, 49] = 1.0
    assert predictions(scores).tolist() == [0, 7, 49]


def test_a_mixture_is_the_weighted_sum():
    scores, labels = torch.tensor([[-1.0, -2.0], [-4.0, -3.0]], dtype=torch.float64), torch.tensor([0, 0])
    loss = mixture({"cross_entropy": 2.0, "accuracy": 0.5, "reward": 7.0})(scores, labels)
    assert loss == 2.0 * cross_entropy(scores, labels) + 0.5 * negative_accuracy(scores, labels)
    assert torch.equal(mixture({"accuracy": 1.0})(scores, labels), negative_accuracy(scores, labels))


def test_standardised_values_have_mean_0_and_spread_1():
    values = standardised(torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64))
    assert values.mean().item() == pytest.approx(0, abs=1e-15)
    assert values.square().mean().item() == pytest.approx(1, rel=1e-15)
    for equal in (0.1, -1e300, 0.0):
        assert torch.equal(standardised(torch.full((7, 3), equal, dtype=torch.float64)), torch.zeros(7, 3).double())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_float64_and_show_a_nan(name):
    scores = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], dtype=torch.float32)
    loss = OBJECTIVES[name](scores, torch.tensor([0, 1]))
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    assert loss.isfinite()
    scores[1] = float("nan")
    assert OBJECTIVES[name](scores, torch.tensor([0, 1])).isnan()


@pytest.mark.parametrize("options", [1, 2, 3, 9])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_each_example_are_those_of_it_alone(name, options):
    """To the bit: a run with a direction for each example logs them, however many examples are scored at once."""
    scores = 3 * torch.randn(129, options, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(0, options, (129,), generator=torch.Generator().manual_seed(1))
    loss = OBJECTIVES[name]
    alone = torch.stack([loss(scores[i : i + 1], labels[i : i + 1]) for i in range(129)])
    assert torch.equal(loss(scores, labels, "none"), alone)
    assert loss(scores, labels).item() == pytest.approx(alone.mean().item(), rel=1e-12)


def test_evaluate_two_classes():
    # Differences 2, -1, 1, -3 for labels 1, 1, 0, 0: of the four pairs of a positive and a negative, 3 are in order.
    scores = torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.0, 1.0], [0.0, -3.0]], dtype=torch.float64)
    metrics = evaluate(scores, torch.tensor([1, 1, 0, 0]))
    assert metrics["accuracy"] == 0.5
    assert metrics["f1"] == pytest.approx(0.5)  # precision 1/2, recall 1/2
    assert metrics["auc"] == 0.75
    losses = [math.log1p(math.exp(-margin)) for margin in (2.0, -1.0, -1.0, 3.0)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-15)


def test_evaluate_three_classes_is_macro_f1():
    scores = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]
    metrics = evaluate(scores, torch.tensor([0, 1, 1, 2]))
    # F1 of the classes: 2/3 (precision 1/2, recall 1), 2/3 (precision 1, recall 1/2), 1.
    assert metrics["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert metrics["auc"] is None


def test_evaluate_has_no_auc_with_one_class():
    assert evaluate(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))["auc"] is None


def test_one_option_is_right_always_and_says_nothing():
    metrics = evaluate(torch.tensor([[-1.0], [-3.0]]), torch.tensor([0, 0]), "lm_cross_entropy")
    assert metrics == {"accuracy": None, "loss": 2.0, "f1": None, "auc": None}
