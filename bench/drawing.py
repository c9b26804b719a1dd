"""The rate of drawing z, which bounds every op: drawn into scratch and left there.

`sum_of_squares` is slower on a CPU: it adds in float64, one element after the other.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, prange, uint32
from shapes import Case

from mezo_kernels import cpu, cpu_draw, sum_of_squares


@njit(parallel=True, error_model="numpy", nogil=True)
def _draw_all(threads, items, buffer):
    n = items.shape[0]
    for t in prange(threads):
        scratch = buffer.ctypes.data + t * 4 * cpu_draw.SCRATCH
        lo, hi = t * n // threads, (t + 1) * n // threads
        while lo < hi:
            end = cpu_draw._end_of_batch(items, lo, hi, 0)
            elements = cpu_draw._number_blocks(scratch, items, lo, end)
            cpu_draw._draw_batch(scratch, items, lo, end, elements, 0, uint32(1), uint32(0))
            lo = end


def drawer(case: Case, device: str) -> Callable:
    """Draws z of a case once, on as many threads as an op takes; on a GPU it is summed in registers."""
    if device != "cpu":
        return lambda: sum_of_squares(case.layout, 1)
    items, n_elements = cpu._items(case.layout.tensors, [], [], [case.layout.geometry])
    threads = cpu._threads(items, n_elements)
    buffer = np.empty(threads * cpu_draw.SCRATCH, np.float32)
    return lambda: _draw_all(threads, items, buffer)
