"""What a run's own numbers say, in words with a remedy; and several runs beside each other."""

import re

import pytest

from mezo.report.verdict import verdicts


def result(losses=(), accuracies=(), n=None, **others):
    rows = [{"step": 10 * i, "loss": loss, "accuracy": None} for i, loss in enumerate(losses)]
    rows += [{"step": 10 * i, "loss": None, "accuracy": value} for i, value in enumerate(accuracies)]
    return {"dev": rows, "steps": 40, "examples": {"dev": n} if n else {}, **others}


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ((1.0, 0.9, 0.8, 0.7, 0.6), "learning: .* still falling .* mezo train --resume runs/x --steps 80"),
        ((1.0, 0.6, 0.51, 0.50, 0.50), "learned: .* 1.0000 to 0.5000 at step 30, little is gained"),
        ((1.0, 0.6, 0.50, 0.50, 0.505), "learned: .* 1.0000 to 0.5000 at step 20, and is at rest"),
        ((1.0, 0.6, 0.51, 0.50, 0.499), "learned: .* 1.0000 to 0.4990 at step 40, little is gained any more"),
        ((1.0, 0.6, 0.5, 0.7, 0.9), "best at step 20, 0.5000, and rose to 0.9000: lower --lr"),
        ((1.0, 1.1, 1.2, 1.3), "not learning: .* mezo tune"),
    ],
    ids=["falling", "equal", "at_rest", "slow", "risen", "never"],
)
def test_the_dev_loss_says_what_to_do_next(losses, text):
    (found,) = verdicts(result(losses), "runs/x")
    assert re.search(text, found), found


def test_a_reward_that_is_trained_is_what_is_judged():
    """The loss of the options may go the other way."""
    rows = [{"step": 10 * i, "loss": 1.0 + i, "reward": 0.1 * i, "accuracy": None} for i in range(5)]
    (found,) = verdicts(result() | {"dev": rows}, "runs/x")
    assert found.startswith("learning: the dev reward was still rising at the end, 0.0000 to 0.4000; go on with")


def test_a_signal_below_the_noise_asks_for_more_of_it():
    weak = verdicts(result(projected_grad_rms=1.2, projected_grad_batch_error=1.0))
    assert weak == [
        "signal below noise: projected_grad is 1.2 in size, and another batch alone changes it by 1: a larger"
        " --batch-size or more --num-perturbations would make steps steadier"
    ]
    strong = verdicts(result(projected_grad_rms=5.0, projected_grad_batch_error=3.0))
    assert strong == ["the signal is 1.3 times the noise that the batch puts on projected_grad"]
    assert verdicts(result(projected_grad_rms=1.0, projected_grad_batch_error=1e200))[0].startswith(
        "signal below noise"
    )


def test_a_gain_within_chance_names_the_size_of_dev():
    (found,) = verdicts(result(accuracies=(0.493, 0.50, 0.503), n=150))
    assert "the standard error of its accuracy is 4.1 points with 150 examples" in found
    assert "the best is 1.0 above the first" in found
    assert verdicts(result(accuracies=(0.5, 0.7), n=150)) == []
    (none,) = verdicts(result(accuracies=(0.5, 0.4), n=150))
    assert "4.1 points with 150 examples, and no step had a better one than the first: take more examples" in none
    classes = [{"step": i, "loss": None, "accuracy": 0.5, "f1": 0.5} for i in range(2)]
    assert len(verdicts(result(n=150) | {"dev": classes})) == 1, "classes have an F1 too"
    for judge in ("reward", "exact_match"):
        rows = [{"step": i, "loss": None, "accuracy": 0.5, judge: 0.0} for i in range(2)]
        assert verdicts(result(n=150) | {"dev": rows}) == [], "texts are judged, accuracy chooses nothing"
    assert verdicts(result(accuracies=(0.5, 0.5))) == [], "a result of an older program says nothing of sizes"
