"""Inner products of directions z over all parameters of a run: the same bits wherever they are computed.

As `rms.py`, this is no op: it draws z by the op `standard_normal`, piece by piece, and adds in integers.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from mezo_kernels.ops import standard_normal

CHUNK = 1 << 12  # elements multiplied at a time: |z| < 8, so a sum of so many products stays below 2**53, exact
FRACTION = 17  # bits after the point that z is rounded to


def inner_products(
    shapes: Mapping[str, Sequence[int]],
    seeds: Sequence[int],
    *,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> torch.Tensor:
    """Z Z^T, row k of Z being z(seeds[k]), normal, over the d elements of all parameters.

    Each element of z is rounded to a multiple of 2**-17, half of which changes a product of two z by about
    sqrt(d) 2**-18. Products of such numbers, and their sums over a piece, are exact in float64, and pieces are added as
    integers: no order of summation, device or backend changes a bit.

    Args:
        shapes: full shape of each parameter by canonical name; their order does not matter.
        seeds: of z, each in [0, 2**64); m of them.
        device: where z is drawn; 4,096 elements of each are kept at a time.
        backend: as in `perturb_`.
    Returns:
        (m, m) float64, on the CPU.
    Raises:
        ValueError: a bad seed or backend.

    >>> inner_products({"w": (2, 2)}, [0]).sqrt().item() / 2  # the root mean square of z
    0.9105644274417359
    """
    total = torch.zeros(len(seeds), len(seeds), dtype=torch.int64, device="cpu")
    for name, shape in shapes.items():
        size = math.prod(shape)
        for start in range(0, size if seeds else 0, CHUNK):
            draw = (standard_normal(seed, name, start, min(CHUNK, size - start), device, backend) for seed in seeds)
            z = torch.stack([each.double() for each in draw]).mul_(2.0**FRACTION).round_()
            total += (z @ z.mT).long().cpu()
    return total.double() / 2.0 ** (2 * FRACTION)
