"""The rate of drawing z, which bounds every op: on a CPU into scratch and left there, on a GPU into one tensor."""

from collections.abc import Callable

import numpy as np
from numba import njit, prange, uint32
from shapes import Case

from mezo_kernels import standard_normal
from mezo_kernels.numba import draw, step


@njit(parallel=True, error_model="numpy", nogil=True)
def _draw_all(threads, items, buffer):
    n = items.shape[0]
    for t in prange(threads):
        scratch = buffer.ctypes.data + t * 4 * draw.SCRATCH
        lo, hi = t * n // threads, (t + 1) * n // threads
        while lo < hi:
            end = draw._end_of_batch(items, lo, hi, 0)
            elements = draw._number_blocks(scratch, items, lo, end)
            draw._draw_batch(scratch, items, lo, end, elements, 0, uint32(1), uint32(0))
            lo = end


def drawer(case: Case, device: str) -> Callable:
    """Draws z of as many elements as a case has, once, on as many threads as an op takes."""
    if device != "cpu":
        return lambda: standard_normal(1, "w", 0, case.elements, device)
    items, n_elements = step._items(case.layout.tensors, [], [], [case.layout.geometry])
    threads = step._threads(items, n_elements)
    buffer = np.empty(threads * draw.SCRATCH, np.float32)
    return lambda: _draw_all(threads, items, buffer)
