"""The root mean square of z: the same bits from every backend, chunk and order, and the right number."""

import math
import struct

import pytest

from mezo_kernels import available_backends, rms, root_mean_square, standard_normal

SHAPES = {"a": (7, 33), "b.weight": (1000,), "c": (2, 3, 5)}


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_backends_chunks_and_orders_agree_in_every_bit(seed, monkeypatch):
    expected = root_mean_square(SHAPES, seed)
    for backend in available_backends("cpu"):
        assert root_mean_square(SHAPES, seed, backend=backend) == expected
    assert root_mean_square(dict(reversed(SHAPES.items())), seed) == expected
    for chunk in (1, 97):
        monkeypatch.setitem(rms.CHUNK, "cpu", chunk)
        assert root_mean_square(SHAPES, seed) == expected


def test_it_is_the_root_of_the_mean_square():
    z = [value for name, s in SHAPES.items() for value in standard_normal(9, name, 0, math.prod(s)).double().tolist()]
    exact = math.sqrt(math.fsum(value * value for value in z) / len(z))
    assert root_mean_square(SHAPES, 9) == pytest.approx(exact, rel=1e-10)


def test_the_number_is_frozen():
    """Logs of runs along normalised z were made with it."""
    assert struct.pack(">d", root_mean_square({"w": (8, 576)}, 42)).hex() == "3fef998c4a221135"


def test_no_elements_are_refused():
    with pytest.raises(ValueError, match="no root mean square"):
        root_mean_square({}, 0)
