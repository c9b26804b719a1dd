"""Random numbers of sampled text: their distribution, what they depend on, and a few of them for good."""

import math

import pytest
import torch

from mezo.method.sampling import Sampling, gumbel, likeliest, sampled, text_seed
from mezo_kernels.philox import philox_4x32

MANY = 40000


def test_numbers_are_those_of_the_formula():
    seed, place, token = 2**63 - 5, 3, 6
    word = philox_4x32(token // 4, place, 0, 3, seed & 0xFFFFFFFF, seed >> 32)[token % 4]
    expected = -math.log(-math.log((word + 0.5) / 2**32))
    got = gumbel([(1, 0), (seed, place)], 9)
    assert got.shape == (2, 9)
    assert got[1, token].item() == pytest.approx(expected, rel=1e-6)


def test_tokens_are_drawn_from_the_distribution():
    probabilities = torch.tensor([0.05, 0.0, 0.15, 0.3, 0.5])
    tokens = sampled(probabilities.expand(MANY, -1), range(MANY), [0] * MANY)
    counts = torch.bincount(tokens, minlength=5) / MANY
    error = (probabilities * (1 - probabilities) / MANY).sqrt()
    assert ((counts - probabilities).abs() <= 4 * error).all()


def test_places_seeds_and_examples_are_independent():
    flat = torch.ones(MANY, 2) / 2
    by_place = sampled(flat, [5] * MANY, range(MANY))
    by_example = sampled(flat, [Sampling(1.0, 9).seed_of(i) for i in range(MANY)], [0] * MANY)
    by_step = sampled(flat, [text_seed(0, step) for step in range(MANY)], [0] * MANY)
    draws = [by_place, by_example, by_step]
    for i, one in enumerate(draws):
        assert abs(one.double().mean() - 0.5) < 4 * 0.5 / MANY**0.5
        assert abs((one[1:] == one[:-1]).double().mean() - 0.5) < 4 * 0.5 / MANY**0.5
        for other in draws[:i]:
            assert abs((one == other).double().mean() - 0.5) < 4 * 0.5 / MANY**0.5


def test_rows_of_one_text_share_their_numbers_and_differ_where_probabilities_do():
    torch.manual_seed(0)
    logits = torch.randn(50, 64)
    near = logits + 0.02 * torch.randn(50, 64)
    plus, minus = Sampling(1.0, 4).pick([*range(50), *range(50)])(torch.cat([logits, near]), 2).split(50)
    alone = Sampling(1.0, 5).pick(range(50))(near, 2)
    assert (plus == minus).double().mean() > 0.9
    assert (plus == alone).double().mean() < 0.3


def test_low_temperatures_come_to_the_likeliest():
    torch.manual_seed(0)
    logits = torch.randn(20, 64)
    assert torch.equal(Sampling(1e-3, 4).pick(range(20))(logits, 0), likeliest(logits, 0))


def test_seeds_fit_an_engines_integers():
    assert all(0 <= Sampling(1.0, 2**64 - 1).seed_of(i) < 2**63 for i in (0, 1, 2**40))
