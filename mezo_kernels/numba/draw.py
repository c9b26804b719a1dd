"""z on a CPU: Philox and Box-Muller compiled with numba, drawn in L1-sized pieces; and loads and stores of every dtype.

Loops are staged over small unit-stride buffers so that LLVM vectorises each of them. The buffers are handed on as
addresses: slices of numpy arrays are reference-counted, which costs 80 ns a draw. No fastmath: it would contract and
reassociate, and z would no longer be the z stream.

A batch is a run of work items whose Philox blocks fit into the scratch together. Its elements lie there block after
block, each item from the place in its first block that its first index has; so one loop runs over all items, and what
lies between them is computed and never stored.
"""

import hashlib
import math
from pathlib import Path

import llvmlite.ir as ir
import numba
import numpy as np
from numba import float32, int32, njit, types, uint32, uint64
from numba.extending import intrinsic

from mezo_kernels.philox import RADEMACHER

CHUNK = 2048  # elements of one work item: its buffers (40 KB) stay in L1
GROUPS = CHUNK // 4 + 16  # Philox blocks of a chunk that begins and ends inside one, in whole cache lines
PAIRS = 128  # Philox blocks from which on they are drawn two by two: fewer would not fill the vectors of a pair
# offsets into a thread's scratch, in words: z; four rows of Philox words; four rows of normals; theta; theta +- eps z;
# and of each block of a batch its number, low and high, and its tensor_id
Z, WORDS, NORMALS, VALUE, MOVED, BLOCKS, SCRATCH = (4 * GROUPS * k for k in range(7))
ADDRESS, STRIDE, DTYPE, N, INDEX, TENSOR = range(6)  # columns of an item; the first three again for each target

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

_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def compiled(parallel: bool = False):
    """numba's njit with code kept on disk for as long as none of these modules changes.

    numba itself looks at a function's own file, and would keep code of `step.py` that has an older `draw.py` inside.
    """

    def decorate(function):
        made = njit(parallel=parallel, error_model="numpy", nogil=True, cache=True)(function)
        made._cache._cache_file._source_stamp = _SOURCES.hexdigest()
        return made

    return decorate


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


@intrinsic
def _store_signs(typingctx, address, word):
    """Write 32 numbers of z, the bits of a word from the lowest on; vectors, since LLVM leaves such a loop scalar."""

    def build(context, builder, sig, args):
        vector = ir.VectorType(ir.IntType(32), 32)
        of = lambda numbers: ir.Constant(vector, list(numbers))  # noqa: E731
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[1], ir.Constant(ir.IntType(32), 0))
        words = builder.shuffle_vector(one, one, of([0] * 32))
        signs = builder.and_(builder.shl(words, of(31 - k for k in range(32))), of([0x80000000] * 32))
        place = builder.inttoptr(args[0], vector.as_pointer())
        builder.store(builder.or_(signs, of([0x3F800000] * 32)), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), build


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
def _philox_pair(c0, c1, c2, c3, d0, d1, d2, d3, k0, k1):
    """`_philox` of two blocks, whose rounds do not wait for each other: a fifth less time than twice one block."""
    for _ in range(10):
        p0, q0 = uint64(c0) * _M0, uint64(d0) * _M0
        p1, q1 = uint64(c2) * _M1, uint64(d2) * _M1
        c0, d0 = uint32(p1 >> _S32) ^ c1 ^ k0, uint32(q1 >> _S32) ^ d1 ^ k0
        c1, d1 = uint32(p1), uint32(q1)
        c2, d2 = uint32(p0 >> _S32) ^ c3 ^ k1, uint32(q0 >> _S32) ^ d3 ^ k1
        c3, d3 = uint32(p0), uint32(q0)
        k0 = uint32(k0 + _W0)
        k1 = uint32(k1 + _W1)
    return c0, c1, c2, c3, d0, d1, d2, d3


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
def _sign(word):
    """1 - 2 * (bit 0): the bit moved to the sign of 1.0."""
    return _float(int32(uint32(word << uint32(31)) | uint32(0x3F800000)))


@njit(inline="always")
def _aligned(buffer):
    """Address in a thread's scratch from which every row is a whole number of cache lines."""
    return (buffer.ctypes.data + 63) & ~63


@njit(inline="always")
def _array(address, stride, n, dtype):
    return numba.carray(_pointer(address), ((n - 1) * stride + 1,), dtype)


@njit(inline="always")
def _row(scratch, offset, k, dtype):
    return _array(scratch + 4 * (offset + k * GROUPS), 1, GROUPS, dtype)


@njit(inline="always")
def _blocks(index, n):
    """Number of the first Philox block of the elements index .. index + n, and how many there are."""
    first = index >> 2
    return first, ((index + n - 1) >> 2) - first + 1


@njit(inline="always")
def _words_of(scratch):
    return (
        _row(scratch, WORDS, 0, np.uint32), _row(scratch, WORDS, 1, np.uint32),
        _row(scratch, WORDS, 2, np.uint32), _row(scratch, WORDS, 3, np.uint32),
    )  # fmt: skip


@njit(inline="always")
def _words(scratch, first, n_blocks, tensor_id, stream, k0, k1):
    w0, w1, w2, w3 = _words_of(scratch)
    if n_blocks < PAIRS:
        for i in range(n_blocks):
            g = uint64(i) + first
            w0[i], w1[i], w2[i], w3[i] = _philox(uint32(g), uint32(g >> _S32), tensor_id, stream, k0, k1)
    else:
        half = (n_blocks + 1) >> 1  # of an odd number one block too many is drawn; the rows have room
        for i in range(half):
            j = i + half
            g, h = uint64(i) + first, uint64(j) + first
            w0[i], w1[i], w2[i], w3[i], w0[j], w1[j], w2[j], w3[j] = _philox_pair(
                uint32(g), uint32(g >> _S32), tensor_id, stream,
                uint32(h), uint32(h >> _S32), tensor_id, stream, k0, k1,
            )  # fmt: skip


@njit(inline="always")
def _normals(scratch, n_blocks):
    """z of the blocks whose words are in the scratch."""
    z = _array(scratch + 4 * Z, 1, 4 * GROUPS, np.float32)
    w0, w1, w2, w3 = _words_of(scratch)
    n0, n1 = _row(scratch, NORMALS, 0, np.float32), _row(scratch, NORMALS, 1, np.float32)
    n2, n3 = _row(scratch, NORMALS, 2, np.float32), _row(scratch, NORMALS, 3, np.float32)
    for i in range(n_blocks):
        n0[i], n1[i] = _box_muller(w0[i], w1[i])
    for i in range(n_blocks):
        n2[i], n3[i] = _box_muller(w2[i], w3[i])
    for i in range(n_blocks):
        z[4 * i] = n0[i]
        z[4 * i + 1] = n1[i]
        z[4 * i + 2] = n2[i]
        z[4 * i + 3] = n3[i]


@compiled()
def _draw(scratch, index, n_elements, tensor_id, stream, k0, k1):
    """Draw z of the elements index .. index + n_elements into scratch; return the address of the first."""
    address = scratch + 4 * (Z + (index & 3))
    if stream == RADEMACHER:
        z = _array(address, 1, n_elements, np.float32)
        first = index >> 7
        groups = ((index + n_elements - 1) >> 7) - first + 1
        _words(scratch, uint64(first), groups, tensor_id, uint32(stream), k0, k1)
        words = _array(scratch + 4 * WORDS, 1, 4 * GROUPS, np.uint32)
        i, j = index - (first << 7), 0
        while j < n_elements:
            word = words[((i >> 5) & 3) * GROUPS + (i >> 7)]
            n = min(32 - (i & 31), n_elements - j)
            if n == 32:
                _store_signs(address + 4 * j, word)
            else:
                for k in range(n):
                    z[j + k] = _sign(word >> uint32((i & 31) + k))
            i, j = i + n, j + n
        return address
    first, n_blocks = _blocks(index, n_elements)
    _words(scratch, uint64(first), n_blocks, tensor_id, uint32(stream), k0, k1)
    _normals(scratch, n_blocks)
    return address


@compiled()
def _end_of_batch(items, lo, hi, stream):
    """Where the batch that begins with item lo ends; a Rademacher block is 128 elements, its batches are one item."""
    if stream == RADEMACHER:
        return lo + 1
    total = 0
    for it in range(lo, hi):
        total += _blocks(items[it, INDEX], items[it, N])[1]
        if total > GROUPS:
            return it
    return hi


@compiled()
def _number_blocks(scratch, items, lo, hi):
    """Write number and tensor_id of each block of a batch of several items; return the elements in the scratch."""
    low, high = _row(scratch, BLOCKS, 0, np.uint32), _row(scratch, BLOCKS, 1, np.uint32)
    tensor_ids = _row(scratch, BLOCKS, 2, np.uint32)
    if hi - lo == 1:
        return 4 * _blocks(items[lo, INDEX], items[lo, N])[1]
    at = 0
    for it in range(lo, hi):
        first, n_blocks = _blocks(items[it, INDEX], items[it, N])
        tensor_id = uint32(items[it, TENSOR])
        for i in range(n_blocks):
            g = uint64(i) + uint64(first)
            low[at + i], high[at + i], tensor_ids[at + i] = uint32(g), uint32(g >> _S32), tensor_id
        at += n_blocks
    return 4 * at


@compiled()
def _draw_batch(scratch, items, lo, hi, n, stream, k0, k1):
    """Draw z of a batch of n elements, which `_number_blocks` has numbered; return the address of the first block."""
    if hi - lo == 1:
        _draw(scratch, items[lo, INDEX], items[lo, N], uint32(items[lo, TENSOR]), stream, k0, k1)
        return scratch + 4 * Z
    w0, w1, w2, w3 = _words_of(scratch)
    low, high = _row(scratch, BLOCKS, 0, np.uint32), _row(scratch, BLOCKS, 1, np.uint32)
    tensor_ids = _row(scratch, BLOCKS, 2, np.uint32)
    half = ((n >> 2) + 1) >> 1
    for i in range(half):
        j = i + half
        w0[i], w1[i], w2[i], w3[i], w0[j], w1[j], w2[j], w3[j] = _philox_pair(
            low[i], high[i], tensor_ids[i], uint32(stream), low[j], high[j], tensor_ids[j], uint32(stream), k0, k1
        )
    _normals(scratch, n >> 2)
    return scratch + 4 * Z


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


@compiled()
def _load(value, address, stride, dtype, n):
    value = _array(value, 1, n, np.float32)
    if dtype == 0:
        _map(_same, _array(address, stride, n, np.float32), stride, value, 1, n)
    elif dtype == 1:
        _map(_bfloat_to_float, _array(address, stride, n, np.uint16), stride, value, 1, n)
    else:
        _map(_half_to_float, _array(address, stride, n, np.uint16), stride, value, 1, n)


@compiled()
def _store(value, address, stride, dtype, n):
    value = _array(value, 1, n, np.float32)
    if dtype == 0:
        _map(_same, value, 1, _array(address, stride, n, np.float32), stride, n)
    elif dtype == 1:
        _map(_float_to_bfloat, value, 1, _array(address, stride, n, np.uint16), stride, n)
    else:
        _map(_float_to_half, value, 1, _array(address, stride, n, np.uint16), stride, n)


@compiled()
def _load_batch(value, items, lo, hi, column):
    """Load a batch from the addresses in `column` of its items."""
    for it in range(lo, hi):
        index, n = items[it, INDEX], items[it, N]
        address, stride, dtype = items[it, column], items[it, column + STRIDE], items[it, column + DTYPE]
        _load(value + 4 * (index & 3), address, stride, dtype, n)
        value += 16 * _blocks(index, n)[1]


@compiled()
def _store_batch(value, items, lo, hi, column):
    """Store a batch to the addresses in `column` of its items."""
    for it in range(lo, hi):
        index, n = items[it, INDEX], items[it, N]
        address, stride, dtype = items[it, column], items[it, column + STRIDE], items[it, column + DTYPE]
        _store(value + 4 * (index & 3), address, stride, dtype, n)
        value += 16 * _blocks(index, n)[1]
