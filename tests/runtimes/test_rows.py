"""Rows of a batch in groups of like length: the cheapest groups, and parts of a batch."""

import itertools
import random

import pytest
import torch

from mezo.runtimes.rows import RowBatch, by_length, rows_of
from tests.runtimes.hf.test_runtime import examples


def cost(groups, lengths, call):
    return sum(len(own) * max(lengths[n] for n in own) + call for own in groups)


@pytest.mark.parametrize("call", [1, 7, 48])
def test_groups_are_the_cheapest_of_all(call):
    rng = random.Random(call)
    for _ in range(20):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 8))]
        groups = by_length(lengths, call)
        assert sorted(n for own in groups for n in own) == list(range(len(lengths)))
        ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
        every = (
            [ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(lengths)))]
            for k in range(len(lengths))
            for cuts in itertools.combinations(range(1, len(lengths)), k)
        )
        assert cost(groups, lengths, call) == min(cost(own, lengths, call) for own in every)


def test_rows_of_one_length_are_one_group():
    assert by_length([5] * 100, call=1) == [list(range(100))]


def test_a_part_of_a_batch_is_the_batch_of_its_rows():
    rows = [row for example in examples(9, several=True) for row in rows_of(example)]
    whole, own = RowBatch.of(rows, 0, "cpu"), [7, 2, 11]
    part, alone = whole.part(own), RowBatch.of([rows[n] for n in own], 0, "cpu")
    assert torch.equal(part.ids, alone.ids)
    assert torch.equal(part.mask, alone.mask)
    assert torch.equal(part.positions[part.valid], alone.positions[alone.valid])
