"""`worst`, by which these tests compare scores, tells what differs and what is no number."""

import math

import pytest
import torch

from tests.runtimes.sglang.conftest import worst

SCORES = [[-1.0, -2.0, -math.inf], [-1.0, -2.0, -3.0]]


def changed(row, column, value):
    scores = torch.tensor(SCORES)
    scores[row, column] = value
    return scores


def test_a_constant_of_a_row_is_no_difference():
    assert worst(torch.tensor(SCORES), torch.tensor(SCORES) + torch.tensor([[5.0], [-1.0]])) == 0


def test_the_largest_difference_of_any_option_is_found():
    assert worst(torch.tensor(SCORES), changed(1, 2, -3.5)) == 0.5


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_fails(place, value):
    for pair in ((torch.tensor(SCORES), changed(*place, value)), (changed(*place, value), torch.tensor(SCORES))):
        with pytest.raises(AssertionError):
            worst(*pair)
    if not math.isinf(value):
        with pytest.raises(AssertionError):
            worst(changed(*place, value), changed(*place, value))


def test_an_option_that_is_missing_on_one_side_fails():
    with pytest.raises(AssertionError, match="missing on one side"):
        worst(torch.tensor(SCORES), changed(0, 2, -1.0))
