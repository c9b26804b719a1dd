"""The root mean square of z over all parameters of a run: one number, the same bits wherever it is computed.

This is no op of `dispatch.OPS`. It writes no parameter and has no kernel: it draws z by the op `standard_normal`, piece
by piece, and adds in integers. So every backend gives its bits without code of its own for it.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from mezo_kernels.ops import standard_normal

CHUNK = {"cpu": 1 << 15}  # elements drawn at a time: few enough for one thread and its cache
ON_GPU = 1 << 20
FRACTION = 36  # bits after the point; z**2 < 2**6, so a chunk's sum stays below 2**62


def root_mean_square(
    shapes: Mapping[str, Sequence[int]], seed: int, *, device: str | torch.device = "cpu", backend: str | None = None
) -> float:
    """sqrt(sum z(seed)**2 / d) over the d elements of all parameters, under normal z.

    z over this number lies on the sphere of radius sqrt(d). Each square, exact in float64, is cut to a multiple of
    2**-36, and integers are summed: no order of summation, device or backend changes a bit.

    Args:
        shapes: full shape of each parameter by canonical name; their order does not matter.
        seed: 0 <= seed < 2**64.
        device: where z is drawn; at most 1,048,576 elements of it are kept at a time.
        backend: as in `perturb_`.
    Returns:
        A number > 0 as Python's float.
    Raises:
        ValueError: no elements; a bad seed or backend.

    >>> root_mean_square({"w": (2, 2)}, seed=0)
    0.910565264432902
    """
    total, count, chunk = 0, 0, CHUNK.get(torch.device(device).type, ON_GPU)
    for name, shape in shapes.items():
        size = math.prod(shape)
        for start in range(0, size, chunk):
            z = standard_normal(seed, name, start, min(chunk, size - start), device, backend).double()
            total += int((z * z * 2.0**FRACTION).long().sum())
        count += size
    if not count:
        raise ValueError("z of no elements has no root mean square: give at least one shape with elements")
    return math.sqrt(total / (count << FRACTION))
