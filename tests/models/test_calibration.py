"""The directions of what layers are given, part by part, against those of all rows at once."""

import pytest
import torch
from torch import nn

from mezo.errors import UserError
from mezo.models.calibration import BESIDE, TOGETHER, Pass, Sketch, seen_by

ALL = tuple(range(40))


def decaying(rows, n, shared=5.0):
    """Rows whose directions are ever smaller and that share a large mean, as activations do."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(n, generator=generator)
    return torch.randn(rows, n, generator=generator) * torch.logspace(0, -4, n) + shared * mean / mean.norm()


def directions_of(x, r):
    """By the formula: the mean, the principal directions without it, each over its root mean square."""
    mean = x.double().mean(0)
    mean /= mean.norm()
    rest = x.double() - torch.outer(x.double() @ mean, mean)
    vectors = torch.cat([mean[None], torch.linalg.svd(rest, full_matrices=False)[2][: r - 1]])
    return vectors / (x.double() @ vectors.T).square().mean(0).sqrt()[:, None]


def alike(a, b, tolerance):
    """Equal rows up to their signs."""
    a, b = a.double(), b.double()
    return torch.allclose(a * (a * b).sum(1).sign()[:, None], b, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("parts", [[1000], [1, 2, 300, 600, 97], [10] * 100], ids=["one", "odd", "many"])
def test_the_directions_are_those_of_all_rows_at_once(parts):
    x, sketch = decaying(1000, 64), Sketch(4)
    for part in x.split(parts):
        sketch.add(part)
    assert sketch.rows == 1000
    assert alike(sketch.even(), directions_of(x, 4), 1e-3)


def test_directions_are_at_right_angles_and_of_one_size():
    x, sketch = decaying(500, 32), Sketch(5)
    sketch.add(x)
    found = sketch.even()
    gram = found @ found.T
    assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-5 * gram.max().item())
    assert torch.allclose((x @ found.T).square().mean(0), torch.ones(5), atol=1e-4)
    assert (x @ found[1:].T).mean(0).abs().max() < 1e-3, "the mean is in the first one alone"


def test_what_is_held_is_bounded():
    sketch = Sketch(4)
    for part in decaying(3000, 64).split(100):
        sketch.add(part)
        assert sum(map(len, sketch.held)) < 4 + BESIDE + TOGETHER


def test_fewer_directions_than_wanted_are_none():
    sketch = Sketch(3)
    sketch.add(torch.ones(100, 1) @ torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert sketch.even() is None
    sketch.add(torch.eye(4))
    assert sketch.even().shape == (3, 4)


@pytest.mark.parametrize("r", [1, 2])
def test_rows_without_a_mean_have_principal_directions_alone(r):
    x, sketch = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), Sketch(r)
    sketch.add(torch.cat([x, -x]))
    assert torch.allclose(sketch.even(), torch.tensor([[2**0.5 / 3, 0.0, 0.0], [0.0, 2**0.5 / 2, 0.0]])[:r])
    nothing = Sketch(r)
    nothing.add(torch.zeros(4, 3))
    assert nothing.even() is None


def test_outputs_are_without_their_bias_and_hooks_are_gone():
    layer, x = nn.Linear(6, 5), decaying(40, 6)
    nn.init.constant_(layer.bias, 100.0)
    found = seen_by({"layer": layer}, 2, [Pass(lambda: layer(x), 40, ALL, ALL)])["layer"]
    length = (x.double() @ layer.weight.detach().double().T).square().sum(1).mean().sqrt()
    assert found.output == pytest.approx(length.item(), rel=1e-5)
    assert alike(found.directions, directions_of(x, 2), 1e-4)
    assert not layer._forward_hooks


def test_positions_that_are_not_read_do_not_count():
    layer, x = nn.Linear(6, 5), decaying(40, 6)
    read = Pass(lambda: layer(x[None]), 40, ALL, tuple(range(7, 20)))
    other = Pass(lambda: layer(x[:9]), 40, ALL, (0,))  # tokens of an expert: which is where is not known
    found = seen_by({"layer": layer}, 2, [read, other])["layer"]
    assert alike(found.directions, directions_of(torch.cat([x[7:20], x[:9]]), 2), 1e-4)


def test_all_positions_count_where_the_scored_ones_are_alike():
    layer, x = nn.Linear(6, 5), decaying(40, 6)
    same = [torch.cat([part, torch.full((1, 6), 2.0)]) for part in x.split(4)]
    passes = [Pass(lambda rows=rows: layer(rows), 5, tuple(range(5)), (4,)) for rows in same]
    found = seen_by({"layer": layer}, 2, passes)["layer"]
    assert alike(found.directions, directions_of(torch.cat(same), 2), 1e-4)
    with pytest.raises(UserError, match="layer saw 50 tokens, which have no 7 directions"):
        seen_by({"layer": layer}, 7, passes)


def test_padding_does_not_count():
    layer, x = nn.Linear(6, 5), decaying(40, 6)
    padded = torch.cat([x, torch.full((40, 6), 1e3)])
    found = seen_by({"layer": layer}, 2, [Pass(lambda: layer(padded), 80, ALL, ALL)])["layer"]
    assert alike(found.directions, directions_of(x, 2), 1e-4)
