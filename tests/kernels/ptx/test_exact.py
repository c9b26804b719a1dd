"""The fused operations of `triton/philox.py` give the bits of the plain ones: for every word that z is drawn from."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from mezo_kernels.ptx.machine import fused, reciprocal_root

F = np.float32
ULPS = (-4, -2, -1, 0, 1, 2, 4)
"""By how much an approximate reciprocal root may be off; NVIDIA's manual says 2**-22.9 of it, about one."""
WORDS = 2**22  # of a part
# words are rounded to float32 before anything else: below 2**24 every one counts, above one of 2, 4, ... 256
EVERY = [(0, 2**24, 1), *((2 ** (24 + k), 2 ** (25 + k), 2 ** (k + 1)) for k in range(8))]
SOME = [(0, 2**12, 1), (2**24 - 2**10, 2**24 + 2**10, 1), (2**32 - 2**17, 2**32, 128), (5, 2**32, 65537)]


def words(ranges: list[tuple[int, int, int]]) -> Iterator[np.ndarray]:
    """uint32 numbers of the ranges (first, end, step), in parts."""
    for first, end, step in ranges:
        for lo in range(first, end, WORDS * step):
            yield np.arange(lo, min(end, lo + WORDS * step), step, dtype=np.uint64).astype(np.uint32)


def plain(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """u, then (log_u, t, m, e) as `box_muller` has them before they differ, and sqrt(-2 log u)."""
    u = x * F(2.3283064365386963e-10) + F(1.1641532182693481e-10)
    b = u.view(np.int32)
    e = (b - np.int32(0x3F3504F3)) >> np.int32(23)
    m = (b - (e << np.int32(23))).view(F) - F(1)
    p = m * F(7.0376836292e-2) + F(-1.1514610310e-1)
    for c in (1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1,
              3.3333331174e-1):  # fmt: skip
        p = p * m + F(c)
    t, e = m * m, e.astype(F)
    log_u = (p * m) * t + e * F(-2.12194440e-4)
    whole = (m + (log_u - F(0.5) * t)) + e * F(0.693359375)
    return u, log_u, t, m, e, np.sqrt(F(-2) * whole)


def radius(log_u, t, m, e, ulps: int) -> np.ndarray:
    """What RADIUS computes, with a reciprocal root so many units in the last place off."""
    v = fused(log_u, F(-2), t)
    v = fused(m, F(-2), v)
    v = fused(e, F(-1.38671875), v)
    return np.where(v == 0, F(-0.0), root(v, ulps))


def root(v: np.ndarray, ulps: int) -> np.ndarray:
    """The root of RADIUS for v > 0."""
    y = reciprocal_root(v)
    y = (y.view(np.int32) + np.int32(ulps)).view(F)
    s, h = v * y, y * F(0.5)
    d = fused(-s, h, F(0.5))
    s, h = fused(s, d, s), fused(h, d, h)
    return fused(fused(-s, s, v), h, s)


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


@pytest.mark.parametrize(
    "ranges", [pytest.param(SOME, id="some"), pytest.param(EVERY, id="every", marks=pytest.mark.slow)]
)
def test_the_radius_of_every_word(ranges):
    """u, and the radius for reciprocal roots up to 4 units off, bit for bit; "every" are all that words round to."""
    with np.errstate(all="ignore"):
        for i, part in enumerate(words(ranges)):
            x = part.astype(F)
            u, *parts, expected = plain(x)
            assert np.array_equal(bits(fused(x, F(2.0**-32), F(2.0**-33))), bits(u))
            for ulps in ULPS if ranges is SOME else (ULPS[i % len(ULPS)],):
                assert np.array_equal(bits(radius(*parts, ulps)), bits(expected)), ulps


@pytest.mark.parametrize("step", [pytest.param(4099, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)])
def test_the_root_of_every_significand(step):
    """Of two binades, of which all others are multiples by a power of 4."""
    with np.errstate(all="ignore"):
        for lo in range(0x3F800000, 0x40800000, WORDS * step):
            v = np.arange(lo, min(0x40800000, lo + WORDS * step), step, dtype=np.uint32).view(F)
            for ulps in ULPS:
                assert np.array_equal(bits(root(v, ulps)), bits(np.sqrt(v))), ulps


def test_one_minus_half():
    """w is f**2 of an angle f of at most pi / 4."""
    w = np.linspace(0, 0.62, 2**18, dtype=F)
    assert np.array_equal(bits(fused(w, F(-0.5), F(1))), bits(F(1) - F(0.5) * w))


def test_a_reciprocal_root_that_is_far_off_is_seen():
    v = np.arange(0x3F800000, 0x40800000, 4099, dtype=np.uint32).view(F)
    assert not np.array_equal(bits(root(v, 2**17)), bits(np.sqrt(v)))


def test_fused_rounds_once():
    """Against exact fractions, with results that lie next to ties, and signs of zero."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0x3F000000, 0x40000000, 3000, dtype=np.uint32).view(F) for _ in range(2))
    near = -(a.astype(np.float64) * b).astype(F)
    others = rng.standard_normal(3000) * 2.0 ** rng.integers(-30, 30, 3000)
    c = np.where(rng.random(3000) < 0.5, near, others).astype(F)
    for x, y, z, got in zip(*(one.tolist() for one in (a, b, c, fused(a, b, c))), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        low, high = (float(np.nextafter(F(got), F(side))) for side in (-np.inf, np.inf))
        assert abs(exact - Fraction(got)) <= min(abs(exact - Fraction(low)), abs(exact - Fraction(high)))
