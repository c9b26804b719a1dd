"""The singular vectors of activations, part by part, against those of all rows at once."""

import pytest
import torch
from torch import nn

from mezo.models.calibration import BESIDE, TOGETHER, Pass, Sketch, vectors_of


def decaying(rows, n):
    """Rows whose directions are ever smaller, as those of activations are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, n, generator=generator) * torch.logspace(0, -4, n)


@pytest.mark.parametrize("parts", [[1000], [1, 2, 300, 600, 97], [10] * 100], ids=["one", "odd", "many"])
def test_the_vectors_are_those_of_all_rows_at_once(parts):
    x, sketch = decaying(1000, 64), Sketch(4)
    for part in x.split(parts):
        sketch.add(part)
    _, _, v = torch.linalg.svd(x)
    assert sketch.rows == 1000
    assert (sketch.vectors() @ v[:4].T).abs().diagonal() == pytest.approx(torch.ones(4), abs=1e-4)


def test_what_is_held_is_bounded():
    sketch = Sketch(4)
    for part in decaying(3000, 64).split(100):
        sketch.add(part)
        assert sum(map(len, sketch.held)) < 4 + BESIDE + TOGETHER


def test_a_vector_has_one_sign():
    x, a, b = decaying(50, 8), Sketch(3), Sketch(3)
    a.add(x)
    b.add(-x)
    assert torch.allclose(a.vectors(), b.vectors(), atol=1e-6)


def test_fewer_directions_than_wanted_are_none():
    sketch = Sketch(3)
    sketch.add(torch.ones(100, 1) @ torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert sketch.vectors() is None
    sketch.add(torch.eye(4))
    assert sketch.vectors().shape == (3, 4)


def test_outputs_are_without_their_bias_and_hooks_are_gone():
    layer, x = nn.Linear(6, 5), decaying(40, 6)
    nn.init.constant_(layer.bias, 100.0)
    found = vectors_of({"layer": layer}, 2, [Pass(lambda: layer(x), 40)], "--factors outputs", outputs=True)
    _, _, v = torch.linalg.svd(x @ layer.weight.detach().T)
    assert (found["layer"] @ v[:2].T).abs().diagonal() == pytest.approx(torch.ones(2), abs=1e-4)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_positions_that_are_not_read_do_not_count():
    layer, x = nn.Linear(6, 5), decaying(40, 6)
    read = Pass(lambda: layer(x[None]), 40, tuple(range(7, 20)))
    other = Pass(lambda: layer(x[:9]), 40, (0,))  # tokens of an expert: which is where is not known
    found = vectors_of({"layer": layer}, 2, [read, other], "--lora-a calibrated")
    _, _, v = torch.linalg.svd(torch.cat([x[7:20], x[:9]]))
    assert (found["layer"] @ v[:2].T).abs().diagonal() == pytest.approx(torch.ones(2), abs=1e-4)
