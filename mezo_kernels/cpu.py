"""The ops compiled for CPUs with numba: one call over all parameters, z drawn in L1-sized chunks.

Loops are staged over small unit-stride buffers so that LLVM vectorises each of them. The buffers are handed on as
addresses: slices of numpy arrays are reference-counted, which costs 80 ns a draw. No fastmath: it would contract and
reassociate, and z would no longer be the z stream.
"""

import math
import threading

import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba import float32, int32, njit, prange, types, uint32, uint64
from numba.extending import intrinsic

from mezo_kernels.layout import TENSOR_ID, AddressCache, matrix_view
from mezo_kernels.philox import RADEMACHER, STREAMS

CHUNK = 2048  # elements of one work item: its buffers (40 KB) stay in L1
GROUPS = CHUNK // 4 + 2  # Philox blocks of a chunk that begins and ends inside one, and one to spare
# offsets into a thread's scratch, in words: z; four rows of Philox words; four rows of normals; theta; theta +- eps z
Z, WORDS, NORMALS, VALUE, MOVED, SCRATCH = (4 * GROUPS * k for k in range(6))
# elements drawn by one call; a second thread saves 0.1 ms here where its core is idle, and costs 10 ms where it is not
PARALLEL_FROM = 200_000
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THETA, PAIR = 6, 6  # columns of an item: (address, stride, dtype code, n, first index, tensor_id), then two targets

F = np.float32
_M0, _M1, _S32, _U32 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32), np.uint64(0xFFFFFFFF)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    F(v)
    for v in (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
              -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
)  # fmt: skip
_LN_LO, _LN_HI, _HALF, _ONE, _MINUS2 = F(-2.12194440e-4), F(0.693359375), F(0.5), F(1), F(-2)
_S0, _S1, _S2 = F(-1.9515295891e-4), F(8.3321608736e-3), F(-1.6666654611e-1)
_C0, _C1, _C2 = F(2.443315711809948e-5), F(-1.388731625493765e-3), F(4.166664568298827e-2)
_U_SCALE, _U_SHIFT, _ANGLE = F(2.0**-32), F(2.0**-33), F(3.657295198167899e-10)
_TO_NORMAL, _TO_SUBNORMAL = F(2.0**112), F(2.0**-1)  # exponent shifts between float16 and float32


@intrinsic
def _bits(typingctx, x):
    """float32 -> its bits as int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(typingctx, x):
    """int32 bits -> float32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _pointer(typingctx, address):
    """int64 address -> void pointer."""
    kind = types.voidptr(types.int64)
    return kind, lambda context, builder, sig, args: builder.inttoptr(args[0], ir.IntType(8).as_pointer())


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0 = uint64(c0) * _M0
        p1 = uint64(c2) * _M1
        c0 = uint32(p1 >> _S32) ^ c1 ^ k0
        c1 = uint32(p1)
        c2 = uint32(p0 >> _S32) ^ c3 ^ k1
        c3 = uint32(p0)
        k0 = uint32(k0 + _W0)
        k1 = uint32(k1 + _W1)
    return c0, c1, c2, c3


@njit(inline="always")
def _box_muller(x, y):
    u = float32(x) * _U_SCALE + _U_SHIFT
    b = _bits(u)
    e = int32(int32(b - int32(0x3F3504F3)) >> int32(23))
    m = _float(int32(b - int32(e << int32(23)))) - _ONE
    p = (((((((_L0 * m + _L1) * m + _L2) * m + _L3) * m + _L4) * m + _L5) * m + _L6) * m + _L7) * m + _L8
    t = m * m
    ef = float32(e)
    log_u = (m + (p * m * t + ef * _LN_LO - _HALF * t)) + ef * _LN_HI
    r = float32(math.sqrt(_MINUS2 * log_u))
    q = uint32(y >> uint32(30))
    f = float32(int32(uint32(y << uint32(2)))) * _ANGLE
    w = f * f
    s = ((_S0 * w + _S1) * w + _S2) * (w * f) + f
    c = ((_C0 * w + _C1) * w + _C2) * (w * w) + (_ONE - _HALF * w)
    cosine = s if (q & uint32(1)) else c
    sine = c if (q & uint32(1)) else s
    cosine = -cosine if (q == uint32(1) or q == uint32(2)) else cosine
    sine = -sine if q >= uint32(2) else sine
    return r * cosine, r * sine


@njit(inline="always")
def _array(address, stride, n, dtype):
    return numba.carray(_pointer(address), ((n - 1) * stride + 1,), dtype)


@njit(inline="always")
def _row(scratch, offset, k, dtype):
    return _array(scratch + 4 * (offset + k * GROUPS), 1, GROUPS, dtype)


@njit(inline="always")
def _words(scratch, first_group, n_groups, tensor_id, stream, k0, k1):
    w0, w1 = _row(scratch, WORDS, 0, np.uint32), _row(scratch, WORDS, 1, np.uint32)
    w2, w3 = _row(scratch, WORDS, 2, np.uint32), _row(scratch, WORDS, 3, np.uint32)
    for i in range(n_groups):
        g = uint64(i) + first_group
        w0[i], w1[i], w2[i], w3[i] = _philox(uint32(g), uint32(g >> _S32), tensor_id, stream, k0, k1)
    return w0, w1, w2, w3


@njit(error_model="numpy", nogil=True, cache=True)
def _draw(scratch, index, n_elements, tensor_id, stream, k0, k1):
    """Draw z of the elements index .. index + n_elements into scratch; return the address of the first."""
    z = _array(scratch + 4 * Z, 1, 4 * GROUPS, np.float32)
    if stream == RADEMACHER:
        first = index >> 7
        groups = ((index + n_elements - 1) >> 7) - first + 1
        _words(scratch, uint64(first), groups, tensor_id, uint32(stream), k0, k1)
        words = _array(scratch + 4 * WORDS, 1, 4 * GROUPS, np.uint32)
        for j in range(n_elements):
            i = index + j - (first << 7)
            word = words[((i >> 5) & 3) * GROUPS + (i >> 7)]
            z[j] = _ONE - F(2) * float32((word >> uint32(i & 31)) & uint32(1))
        return scratch + 4 * Z
    first = index >> 2
    groups = ((index + n_elements - 1) >> 2) - first + 1
    w0, w1, w2, w3 = _words(scratch, uint64(first), groups, tensor_id, uint32(stream), k0, k1)
    n0, n1 = _row(scratch, NORMALS, 0, np.float32), _row(scratch, NORMALS, 1, np.float32)
    n2, n3 = _row(scratch, NORMALS, 2, np.float32), _row(scratch, NORMALS, 3, np.float32)
    for i in range(groups):
        n0[i], n1[i] = _box_muller(w0[i], w1[i])
    for i in range(groups):
        n2[i], n3[i] = _box_muller(w2[i], w3[i])
    for i in range(groups):
        z[4 * i] = n0[i]
        z[4 * i + 1] = n1[i]
        z[4 * i + 2] = n2[i]
        z[4 * i + 3] = n3[i]
    return scratch + 4 * (Z + (index & 3))


@njit(inline="always")
def _same(x):
    return x


@njit(inline="always")
def _bfloat_to_float(h):
    return _float(int32(uint32(h) << uint32(16)))


@njit(inline="always")
def _half_to_float(h):
    h = uint32(h)
    x = _float(int32(uint32(h & uint32(0x7FFF)) << uint32(13))) * _TO_NORMAL
    b = uint32(_bits(x))
    b = b | uint32(0x7F800000) if (h & uint32(0x7C00)) == uint32(0x7C00) else b
    return _float(int32(b | ((h & uint32(0x8000)) << uint32(16))))


@njit(inline="always")
def _float_to_half(x):
    """Round to nearest even, by integer rounding (normal) or by the adder (subnormal: ulps of 2**-24 below 1/2)."""
    b = uint32(_bits(x))
    sign = (b >> uint32(16)) & uint32(0x8000)
    b = b & uint32(0x7FFFFFFF)
    normal = uint32(b - uint32(0x38000000) + uint32(0xFFF) + ((b >> uint32(13)) & uint32(1))) >> uint32(13)
    subnormal = uint32(_bits(_float(int32(b)) + _TO_SUBNORMAL)) - uint32(0x3F000000)
    h = subnormal if b < uint32(0x38800000) else normal
    h = uint32(0x7C00) if b >= uint32(0x47800000) else h
    h = uint32(0x7E00) if b > uint32(0x7F800000) else h
    return uint32(h | sign)


@njit(inline="always")
def _float_to_bfloat(x):
    b = uint32(_bits(x))
    rounded = uint32(b + uint32(0x7FFF) + ((b >> uint32(16)) & uint32(1))) >> uint32(16)
    return uint32(0x7FC0) if (b & uint32(0x7FFFFFFF)) > uint32(0x7F800000) else rounded


@njit(inline="always")
def _map(convert, x, x_stride, y, y_stride, n):
    """y <- convert(x). LLVM vectorises the first loop only: a factor of two of the whole op."""
    if x_stride == 1 and y_stride == 1:
        for j in range(n):
            y[j] = convert(x[j])
    else:
        for j in range(n):
            y[j * y_stride] = convert(x[j * x_stride])


@njit(error_model="numpy", nogil=True, cache=True)
def _load(value, address, stride, dtype, n):
    value = _array(value, 1, n, np.float32)
    if dtype == 0:
        _map(_same, _array(address, stride, n, np.float32), stride, value, 1, n)
    elif dtype == 1:
        _map(_bfloat_to_float, _array(address, stride, n, np.uint16), stride, value, 1, n)
    else:
        _map(_half_to_float, _array(address, stride, n, np.uint16), stride, value, 1, n)


@njit(error_model="numpy", nogil=True, cache=True)
def _store(value, address, stride, dtype, n):
    value = _array(value, 1, n, np.float32)
    if dtype == 0:
        _map(_same, value, 1, _array(address, stride, n, np.float32), stride, n)
    elif dtype == 1:
        _map(_float_to_bfloat, value, 1, _array(address, stride, n, np.uint16), stride, n)
    else:
        _map(_float_to_half, value, 1, _array(address, stride, n, np.uint16), stride, n)


@njit(error_model="numpy", nogil=True, cache=True)
def _subtract(y, x, c, z, n):
    """y <- x - (c * z), n floats at each address; y may be x, which LLVM must be told or it takes the scalar loop."""
    same, x, y, z = x == y, _array(x, 1, n, np.float32), _array(y, 1, n, np.float32), _array(z, 1, n, np.float32)
    if same:
        for j in range(n):
            x[j] = x[j] - c * z[j]
    else:
        for j in range(n):
            y[j] = x[j] - c * z[j]


@njit(error_model="numpy", nogil=True, cache=True)
def _multiply(value, decay, n):
    value = _array(value, 1, n, np.float32)
    for j in range(n):
        value[j] = value[j] * decay


@njit(error_model="numpy", nogil=True, cache=True)
def _step_items(items, lo, hi, buffer, thread, updates, coefficients, decays, draws, next_seeds, eps, stream):
    scratch = buffer.ctypes.data + thread * 4 * SCRATCH
    value, moved = scratch + 4 * VALUE, scratch + 4 * MOVED
    for it in range(lo, hi):
        item = items[it]
        n, index, tensor_id = item[3], item[4], uint32(item[5])
        _load(value, item[0], item[1], item[2], n)
        for k in range(coefficients.size):
            # theta <- theta * decay, then theta - (c * z)
            if decays[k] != _ONE:
                _multiply(value, decays[k], n)
            if draws[k]:
                z = _draw(scratch, index, n, tensor_id, stream, updates[k, 0], updates[k, 1])
                _subtract(value, value, coefficients[k], z, n)
        if coefficients.size:
            _store(value, item[0], item[1], item[2], n)
        for p in range(next_seeds.shape[0]):
            # theta + eps z = theta - (-eps) z
            at = THETA + p * PAIR
            z = _draw(scratch, index, n, tensor_id, stream, next_seeds[p, 0], next_seeds[p, 1])
            _subtract(moved, value, -eps, z, n)
            _store(moved, item[at], item[at + 1], item[at + 2], n)
            _subtract(moved, value, eps, z, n)
            _store(moved, item[at + 3], item[at + 4], item[at + 5], n)


@njit(parallel=True, error_model="numpy", nogil=True, cache=True)
def _step_parallel(threads, items, buffer, updates, coefficients, decays, draws, next_seeds, eps, stream):
    n = items.shape[0]
    for t in prange(threads):
        lo, hi = t * n // threads, (t + 1) * n // threads
        _step_items(items, lo, hi, buffer, t, updates, coefficients, decays, draws, next_seeds, eps, stream)


@njit(error_model="numpy", nogil=True, cache=True)
def _draw_items(items, lo, hi, buffer, thread, squares, write, k0, k1, stream):
    """Sum of z**2 of each item in float64, and z itself to the item's address where asked."""
    scratch = buffer.ctypes.data + thread * 4 * SCRATCH
    for it in range(lo, hi):
        item = items[it]
        n = item[3]
        address = _draw(scratch, item[4], n, uint32(item[5]), stream, k0, k1)
        if write:
            _store(address, item[0], item[1], item[2], n)
        z = _array(address, 1, n, np.float32)
        total = 0.0
        for j in range(n):
            total += np.float64(z[j]) * np.float64(z[j])
        squares[it] = total


@njit(parallel=True, error_model="numpy", nogil=True, cache=True)
def _draw_parallel(threads, items, buffer, squares, write, k0, k1, stream):
    n = items.shape[0]
    for t in prange(threads):
        lo, hi = t * n // threads, (t + 1) * n // threads
        _draw_items(items, lo, hi, buffer, t, squares, write, k0, k1, stream)


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


def standard_normal(seed, tensor_id, start, n_elements, distribution, device) -> torch.Tensor:
    """z of the elements start .. start + n_elements of one parameter, float32."""
    out = torch.empty(n_elements, dtype=torch.float32)
    if n_elements:
        geometry = torch.tensor([(0, tensor_id, start, 1, n_elements, n_elements)])
        _run_draw(*_build_items([out], [], [], geometry), True, seed, distribution)
    return out


def perturb_(theta, geometry, scale, seed, distribution) -> None:
    """theta <- theta + (scale * z), as theta - ((-scale) * z): the same bits."""
    _run(theta, [], [], geometry, [seed], [-scale], [1.0], [True], [], 0.0, distribution)


def step_(theta, plus, minus, geometry, updates, next_seeds, eps, distribution) -> None:
    """Apply (seed, coefficient, decay) updates in order, then write theta +- eps z(next_seed) for each pair."""
    seeds, coefficients, decays = zip(*updates, strict=True) if updates else ((), (), ())
    draws = [c != 0 for c in coefficients]
    _run(theta, plus, minus, geometry, seeds, coefficients, decays, draws, next_seeds, eps, distribution)


def _run(theta, plus, minus, geometry, seeds, coefficients, decays, draws, next_seeds, eps, distribution) -> None:
    items, n_elements = _items(theta, plus, minus, geometry)
    passes = (_keys(seeds), np.array(coefficients, F), np.array(decays, F), np.array(draws, np.bool_))
    arguments = (*passes, _keys(next_seeds), F(eps), STREAMS[distribution])
    threads = _threads(items, n_elements * max(1, len(seeds) + len(next_seeds)))
    if threads == 1:
        _step_items(items, 0, len(items), np.empty(SCRATCH, F), 0, *arguments)
    else:
        with _pool:
            _step_parallel(threads, items, np.empty(threads * SCRATCH, F), *arguments)


def sum_of_squares(theta, geometry, seed, distribution) -> float:
    """Sum over all elements of z**2, in float64, correctly rounded over the work items."""
    return math.fsum(_run_draw(*_items(theta, [], [], geometry), False, seed, distribution))


def _run_draw(items: np.ndarray, n_elements: int, write: bool, seed: int, distribution: str) -> np.ndarray:
    """Draw z of all items, to their addresses where `write`; return the sum of squares of each."""
    squares, k = np.empty(len(items)), _keys([seed])[0]
    arguments = (squares, write, k[0], k[1], STREAMS[distribution])
    threads = _threads(items, n_elements)
    if threads == 1:
        _draw_items(items, 0, len(items), np.empty(SCRATCH, F), 0, *arguments)
    else:
        with _pool:
            _draw_parallel(threads, items, np.empty(threads * SCRATCH, F), *arguments)
    return squares


def _threads(items: np.ndarray, work: int) -> int:
    """How many threads a call is worth; `work` in elements drawn."""
    if work < PARALLEL_FROM:
        return 1
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, len(items))
