"""Inner products of z: the same bits from every backend, chunk and order, and the right numbers."""

import math
import struct

import pytest
import torch

from mezo_kernels import available_backends, inner_products, products, root_mean_square, standard_normal

SHAPES, SEEDS = {"a": (7, 33), "b.weight": (1000,), "c": (2, 3, 5)}, [0, 7, 2**63 + 5]


def test_backends_chunks_and_orders_agree_in_every_bit(monkeypatch):
    expected = inner_products(SHAPES, SEEDS)
    for backend in available_backends("cpu"):
        assert torch.equal(inner_products(SHAPES, SEEDS, backend=backend), expected)
    assert torch.equal(inner_products(dict(reversed(SHAPES.items())), SEEDS), expected)
    for chunk in (1, 97):
        monkeypatch.setattr(products, "CHUNK", chunk)
        assert torch.equal(inner_products(SHAPES, SEEDS), expected)


def test_no_seeds_have_no_products():
    assert inner_products(SHAPES, []).shape == (0, 0)


def test_they_are_the_products():
    z = torch.stack([
        torch.cat([standard_normal(seed, name, 0, math.prod(shape)) for name, shape in SHAPES.items()])
        for seed in SEEDS
    ]).double()  # fmt: skip
    found = inner_products(SHAPES, SEEDS)
    assert torch.allclose(found, z @ z.mT, rtol=0, atol=8 * z.shape[1] ** 0.5 * 2**-18)
    for seed, square in zip(SEEDS, found.diagonal().tolist(), strict=True):
        assert math.sqrt(square / z.shape[1]) == pytest.approx(root_mean_square(SHAPES, seed), rel=1e-5)


def test_the_numbers_are_frozen():
    """Logs of runs with the rule aligned were made with them."""
    (found,) = inner_products({"w": (8, 576)}, [42, 43])[:1, 1:].flatten().tolist()
    assert struct.pack(">d", found).hex() == "c04ef436a2d48000"
