"""The ops compiled for CPUs with numba: one call over all parameters, in batches of work items (see `draw.py`)."""

import functools
import threading
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import prange, uint32

from mezo_kernels.layout import TENSOR_ID, AddressCache, matrix_view
from mezo_kernels.numba.draw import (
    CHUNK,
    MOVED,
    SCRATCH,
    VALUE,
    F,
    _aligned,
    _array,
    _draw,
    _draw_batch,
    _end_of_batch,
    _load_batch,
    _number_blocks,
    _store,
    _store_batch,
    compiled,
)
from mezo_kernels.philox import STREAMS

# elements drawn by one call. A second thread saves 0.2 ms here where its core is idle, and costs 10 ms where it is not;
# and the first parallel call on a machine is compiled for four seconds
PARALLEL_FROM = 1_000_000
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THETA, PAIR = 6, 6  # columns of an item before its targets, and of a pair of them
COEFFICIENT, DECAY = range(2)  # columns of an update's numbers
_ONE = F(1)


@compiled()
def _subtract(y, x, c, z, n):
    """y <- x - (c * z), n floats at each address; y may be x, which LLVM must be told or it takes the scalar loop."""
    same, x, y, z = x == y, _array(x, 1, n, np.float32), _array(y, 1, n, np.float32), _array(z, 1, n, np.float32)
    if same:
        for j in range(n):
            x[j] = x[j] - c * z[j]
    else:
        for j in range(n):
            y[j] = x[j] - c * z[j]


@compiled()
def _multiply(value, decay, n):
    value = _array(value, 1, n, np.float32)
    for j in range(n):
        value[j] = value[j] * decay


@compiled()
def _step_items(items, lo, hi, buffer, thread, seeds, numbers, draws, next_seeds, eps, stream):
    scratch = _aligned(buffer) + thread * 4 * SCRATCH
    value, moved = scratch + 4 * VALUE, scratch + 4 * MOVED
    while lo < hi:
        end = _end_of_batch(items, lo, hi, stream)
        n = _number_blocks(scratch, items, lo, end)
        _load_batch(value, items, lo, end, 0)
        for k in range(draws.size):
            # theta <- theta * decay, then theta - (c * z)
            if numbers[k, DECAY] != _ONE:
                _multiply(value, numbers[k, DECAY], n)
            if draws[k]:
                z = _draw_batch(scratch, items, lo, end, n, stream, seeds[k, 0], seeds[k, 1])
                _subtract(value, value, numbers[k, COEFFICIENT], z, n)
        if draws.size:
            _store_batch(value, items, lo, end, 0)
        for p in range(next_seeds.shape[0]):
            # theta + eps z = theta - (-eps) z
            z = _draw_batch(scratch, items, lo, end, n, stream, next_seeds[p, 0], next_seeds[p, 1])
            _subtract(moved, value, -eps, z, n)
            _store_batch(moved, items, lo, end, THETA + p * PAIR)
            _subtract(moved, value, eps, z, n)
            _store_batch(moved, items, lo, end, THETA + p * PAIR + 3)
        lo = end


@compiled(parallel=True)
def _step_parallel(threads, items, buffer, seeds, numbers, draws, next_seeds, eps, stream):
    n = items.shape[0]
    for t in prange(threads):
        lo, hi = t * n // threads, (t + 1) * n // threads
        _step_items(items, lo, hi, buffer, t, seeds, numbers, draws, next_seeds, eps, stream)


@compiled()
def _draw_items(items, lo, hi, buffer, thread, k0, k1, stream):
    """z of each item, to the item's address."""
    scratch = _aligned(buffer) + thread * 4 * SCRATCH
    for it in range(lo, hi):
        item = items[it]
        address = _draw(scratch, item[4], item[3], uint32(item[5]), stream, k0, k1)
        _store(address, item[0], item[1], item[2], item[3])


@compiled(parallel=True)
def _draw_parallel(threads, items, buffer, k0, k1, stream):
    n = items.shape[0]
    for t in prange(threads):
        lo, hi = t * n // threads, (t + 1) * n // threads
        _draw_items(items, lo, hi, buffer, t, k0, k1, stream)


def _target(tensor: torch.Tensor, position: np.ndarray) -> list[np.ndarray]:
    """Columns (address, stride, dtype code) of the pieces that start at (row, col) = position."""
    _, _, row_stride, col_stride = matrix_view(tensor)
    offset = position[0] * row_stride + position[1] * col_stride
    code = np.full_like(offset, DTYPE_CODE[tensor.dtype])
    return [tensor.data_ptr() + offset * tensor.element_size(), np.full_like(offset, col_stride), code]


def _flat(tensor: torch.Tensor) -> bool:
    rows, cols, row_stride, col_stride = matrix_view(tensor)
    return rows == 1 or row_stride == cols * col_stride


def _build_items(theta, plus, minus, geometry) -> tuple[np.ndarray, int]:
    """Work items of at most CHUNK elements, one row each (where they lie, which elements they are); all elements."""
    table = []
    for i, (tensor, row) in enumerate(zip(theta, geometry.tolist(), strict=True)):
        tensor_id, first_index, rows, cols, full_cols = row[TENSOR_ID:]
        copies = [(plus[k], minus[k]) for k in range(i, len(plus), len(theta))]
        whole = full_cols == cols and all(map(_flat, (tensor, *(t for pair in copies for t in pair))))
        run = rows * cols if whole else cols
        r, c = np.meshgrid(np.arange(1 if whole else rows), np.arange(0, run, CHUNK), indexing="ij")
        r, c = r.ravel(), c.ravel()
        position = np.stack([c // cols, c % cols] if whole else [r, c])
        columns = _target(tensor, position)
        columns += [np.minimum(run - c, CHUNK), first_index + r * full_cols + c, np.full_like(c, tensor_id)]
        for pair in copies:
            columns += _target(pair[0], position) + _target(pair[1], position)
        table.append(np.stack(columns, axis=1))
    return np.ascontiguousarray(np.concatenate(table)), sum(tensor.numel() for tensor in theta)


_items = AddressCache(_build_items)
_pool = threading.Lock()  # numba's default thread pool aborts the process when two threads enter it at once


def _keys(seeds: list[int]) -> np.ndarray:
    return np.array([(s & 0xFFFFFFFF, s >> 32) for s in seeds], dtype=np.uint32).reshape(-1, 2)


def standard_normal(
    seed: int, tensor_id: int, start: int, n_elements: int, distribution: str, device: torch.device
) -> torch.Tensor:
    """z of the elements start .. start + n_elements of one parameter, float32; arguments as in `reference`."""
    out = torch.empty(n_elements, dtype=torch.float32, device=device)
    if not n_elements:
        return out
    geometry = torch.tensor([(0, tensor_id, start, 1, n_elements, n_elements)], device=device)
    items, _ = _build_items([out], [], [], geometry)
    arguments = (*_keys([seed])[0], STREAMS[distribution])
    threads = _threads(items, n_elements)
    if threads == 1:
        _draw_items(items, 0, len(items), np.empty(SCRATCH + 16, F), 0, *arguments)
    else:
        with _pool:
            _draw_parallel(threads, items, np.empty(threads * SCRATCH + 16, F), *arguments)
    return out


def perturb_(
    theta: list[torch.Tensor], geometry: list[torch.Tensor], scale: float, seed: int, distribution: str
) -> None:
    """theta <- theta + (scale * z), as theta - ((-scale) * z): the same bits. Arguments as in `reference`."""
    items, n_elements = _items(theta, [], [], geometry)
    _run(items, n_elements, [(seed, -scale, 1.0)], [True], [], 0.0, distribution)


def step_(
    theta: list[torch.Tensor],
    plus: list[torch.Tensor],
    minus: list[torch.Tensor],
    geometry: list[torch.Tensor],
    updates: list[tuple[int, float, float]],
    next_seeds: list[int],
    eps: float,
    distribution: str,
) -> None:
    """Apply updates in order, then write theta +- eps z(next_seed) for each pair; arguments as in `reference`."""
    prepare_step(theta, plus, minus, geometry)(updates, next_seeds, eps, distribution)


def prepare_step(
    theta: list[torch.Tensor], plus: list[torch.Tensor], minus: list[torch.Tensor], geometry: list[torch.Tensor]
) -> Callable:
    """`step_` of these tensors, which must stay where they are: a function of its other arguments."""
    return functools.partial(_step, *_items(theta, plus, minus, geometry))


def _step(items, n_elements, updates, next_seeds, eps, distribution) -> None:
    _run(items, n_elements, updates, [c != 0 for _, c, _ in updates], next_seeds, eps, distribution)


def _run(items, n_elements, updates, draws, next_seeds, eps, distribution) -> None:
    numbers = np.array([update[1:] for update in updates], F).reshape(-1, 2)
    passes = (_keys([update[0] for update in updates]), numbers, np.array(draws, np.bool_))
    arguments = (*passes, _keys(next_seeds), F(eps), STREAMS[distribution])
    threads = _threads(items, n_elements * max(1, len(updates) + len(next_seeds)))
    if threads == 1:
        _step_items(items, 0, len(items), np.empty(SCRATCH + 16, F), 0, *arguments)
    else:
        with _pool:
            _step_parallel(threads, items, np.empty(threads * SCRATCH + 16, F), *arguments)


def _threads(items: np.ndarray, work: int) -> int:
    """How many threads a call is worth; `work` in elements drawn."""
    if work < PARALLEL_FROM:
        return 1
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, len(items))
