"""A tile of one parameter inside a kernel: which elements it holds, and reading and writing them in storage.

A tile is BLOCK_SIZE / WIDTH units. A unit is WIDTH (4 or 8) consecutive elements of one row, starts where a Philox
block of the full parameter starts, and belongs to one lane. Values of a tile are float32 [units, WIDTH].
"""

import triton
import triton.language as tl

from mezo_kernels.triton import table
from mezo_kernels.triton.philox import concat, halves

FLAT, BY_ROW, GENERAL, ANY = (tl.constexpr(v) for v in (table.FLAT, table.BY_ROW, table.GENERAL, table.ANY))
FP32, BF16, FP16, MIXED = (tl.constexpr(v) for v in (*table.DTYPES.values(), table.MIXED))
INTERPRETED = tl.constexpr(table.INTERPRETED)
TENSOR_ID, FIRST_INDEX, ROWS = (tl.constexpr(v) for v in (table.TENSOR_ID, table.FIRST_INDEX, table.ROWS))
COLS, FULL_COLS, EARLY = (tl.constexpr(v) for v in (table.COLS, table.FULL_COLS, table.EARLY))
HEADER, STORAGE, ADDRESS = (tl.constexpr(v) for v in (table.HEADER, table.STORAGE, table.ADDRESS))
DTYPE, ROW_STRIDE, COL_STRIDE = (tl.constexpr(v) for v in (table.DTYPE, table.ROW_STRIDE, table.COL_STRIDE))
MAX_UNITS = tl.constexpr(1 << 30)


@triton.jit
def tile_of(slots_ptr, tiles_ptr, columns, pid):
    """The tile of program `pid` (int64): (slot_ptr, mode, row, unit)."""
    slot = tl.load(tiles_ptr + 3 * pid)
    row, unit = tl.load(tiles_ptr + 3 * pid + 1), tl.load(tiles_ptr + 3 * pid + 2)
    return slots_ptr + (slot >> 2) * columns, slot & 3, row, unit


@triton.jit
def tensor_id(slot_ptr):
    """The parameter's tensor_id, uint32."""
    return tl.load(slot_ptr + TENSOR_ID).to(tl.uint32)


@triton.jit
def _units_per_row(slot_ptr, WIDTH: tl.constexpr):
    return (tl.load(slot_ptr + COLS) + tl.load(slot_ptr + EARLY) + (WIDTH - 1)) // WIDTH


@triton.jit
def parts(slot_ptr, row, unit, PART: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """How many parts of PART elements a GENERAL tile has: BLOCK_SIZE / PART, or fewer at the parameter's end."""
    left = (tl.load(slot_ptr + ROWS) - row) * _units_per_row(slot_ptr, 4) - unit
    return tl.cdiv(tl.minimum(left, BLOCK_SIZE // 4).to(tl.int32), PART // 4)


@triton.jit
def locate(slot_ptr, row, unit, part, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where the units are of part `part`, BLOCK_SIZE elements, of the tile at (row, unit): (quad, at).

    quad [units], int64, is the (first) Philox block of a unit in the full parameter; `at`, for `load` and `store`, is
    (origin, row, col, mask): a unit starts at element (row, origin + col) of the parameter's storage, and mask is
    [units, 1], or [units, WIDTH] where MODE is GENERAL.
    """
    UNITS: tl.constexpr = BLOCK_SIZE // WIDTH
    lane = part * UNITS + tl.arange(0, UNITS)
    units_per_row = _units_per_row(slot_ptr, WIDTH)
    if MODE == FLAT:
        # 32-bit offsets from one 64-bit origin
        quad = (tl.load(slot_ptr + FIRST_INDEX) >> 2) + (unit + lane) * (WIDTH // 4)
        left = tl.minimum(units_per_row - unit, MAX_UNITS).to(tl.int32)
        at = unit * WIDTH, lane, lane * WIDTH, (lane < left)[:, None]
    else:
        quad, at = _locate_in_rows(slot_ptr, row, unit, lane, units_per_row, MODE, WIDTH)
    return quad, at


@triton.jit
def _locate_in_rows(slot_ptr, row, unit, lane, units_per_row, MODE: tl.constexpr, WIDTH: tl.constexpr):
    rows, cols = tl.load(slot_ptr + ROWS), tl.load(slot_ptr + COLS)
    # dividing only the lanes beyond the tile's first row keeps the division in 32 bits, whatever the sizes
    left = tl.minimum(units_per_row - unit, MAX_UNITS).to(tl.int32)
    period = tl.minimum(units_per_row, MAX_UNITS).to(tl.int32)
    beyond = tl.maximum(lane - left, 0)
    later_row = (beyond.to(tl.uint32) // period.to(tl.uint32)).to(tl.int32)
    row = row + tl.where(lane < left, 0, later_row + 1)
    unit = tl.where(lane < left, unit + lane, (beyond - later_row * period).to(tl.int64))

    start = tl.load(slot_ptr + FIRST_INDEX) + row * tl.load(slot_ptr + FULL_COLS)
    quad = (start >> 2) + unit * (WIDTH // 4)
    mask = (row < rows)[:, None]
    if MODE == BY_ROW:
        col = unit * WIDTH
    else:
        col = unit * WIDTH - (start & 3)
        element = col[:, None] + tl.arange(0, WIDTH)[None, :]
        mask = mask & (element >= 0) & (element < cols)
    return quad, (tl.zeros_like(period), row, col, mask)


@triton.jit
def storage(slot_ptr, number):
    """Where the slot's storage `number` (0 is theta) is: (its columns of the table, its address).

    Called ahead of a draw: what it loads is there when the draw ends, and a store after it need not wait.
    """
    storage_ptr = slot_ptr + HEADER + number * STORAGE
    return storage_ptr, tl.load(storage_ptr + ADDRESS)


@triton.jit
def _pointers(storage, kind, at, MODE: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Pointers [units, COUNT] to the first COUNT of each unit's WIDTH elements, of type `kind`."""
    storage_ptr, address = storage
    origin, row, col, _ = at
    base = address.to(tl.pointer_type(kind))
    element = tl.arange(0, COUNT)[None, :]
    # the table promises the alignment: it calls everything else GENERAL
    if MODE == FLAT:
        pointers = tl.multiple_of(base, 16) + origin + col[:, None] + element
    elif MODE == BY_ROW:
        offset = tl.multiple_of(row * tl.load(storage_ptr + ROW_STRIDE) + col, WIDTH)
        pointers = tl.multiple_of(base, 16) + offset[:, None] + element
    else:
        col_stride = tl.load(storage_ptr + COL_STRIDE)
        offset = row * tl.load(storage_ptr + ROW_STRIDE) + col * col_stride
        pointers = base + offset[:, None] + element * col_stride
    return pointers


@triton.jit
def _widen_bf16(x):
    if INTERPRETED:
        # the interpreter flushes subnormals
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _load_as(storage, at, DTYPE: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr):
    if DTYPE == FP32 and WIDTH == 8:
        # two accesses of 128 bits, so that a unit stays with its lane beside 16-bit storage
        pointers = _pointers(storage, tl.float32, at, MODE, WIDTH, 4)
        value = concat(tl.load(pointers, mask=at[3]), tl.load(pointers + 4, mask=at[3]))
    elif DTYPE == FP32:
        value = tl.load(_pointers(storage, tl.float32, at, MODE, WIDTH, WIDTH), mask=at[3])
    elif DTYPE == BF16:
        value = _widen_bf16(tl.load(_pointers(storage, tl.bfloat16, at, MODE, WIDTH, WIDTH), mask=at[3]))
    else:
        value = tl.load(_pointers(storage, tl.float16, at, MODE, WIDTH, WIDTH), mask=at[3]).to(tl.float32)
    return value


@triton.jit
def _round_to_bf16(x):
    if INTERPRETED:
        # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        narrow = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(tl.bfloat16)
    return narrow


@triton.jit
def _store_as(storage, value, at, DTYPE: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr):
    if DTYPE == FP32 and WIDTH == 8:
        left, right = halves(value)
        pointers = _pointers(storage, tl.float32, at, MODE, WIDTH, 4)
        tl.store(pointers, left, mask=at[3])
        tl.store(pointers + 4, right, mask=at[3])
    elif DTYPE == FP32:
        tl.store(_pointers(storage, tl.float32, at, MODE, WIDTH, WIDTH), value, mask=at[3])
    elif DTYPE == BF16:
        tl.store(_pointers(storage, tl.bfloat16, at, MODE, WIDTH, WIDTH), _round_to_bf16(value), mask=at[3])
    else:
        tl.store(_pointers(storage, tl.float16, at, MODE, WIDTH, WIDTH), value.to(tl.float16), mask=at[3])


@triton.jit
def load(storage, at, KIND: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile's elements as float32 [units, WIDTH], from the slot's storage number `storage` (0 is theta)."""
    if KIND == MIXED:
        kind = tl.load(storage[0] + DTYPE)
        if kind == FP32:
            value = _load_as(storage, at, FP32, MODE, WIDTH)
        elif kind == BF16:
            value = _load_as(storage, at, BF16, MODE, WIDTH)
        else:
            value = _load_as(storage, at, FP16, MODE, WIDTH)
    else:
        value = _load_as(storage, at, KIND, MODE, WIDTH)
    return value


@triton.jit
def store(storage, value, at, KIND: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr):
    """Round float32 values once, to nearest even, and write them to the slot's storage number `storage`."""
    if KIND == MIXED:
        kind = tl.load(storage[0] + DTYPE)
        if kind == FP32:
            _store_as(storage, value, at, FP32, MODE, WIDTH)
        elif kind == BF16:
            _store_as(storage, value, at, BF16, MODE, WIDTH)
        else:
            _store_as(storage, value, at, FP16, MODE, WIDTH)
    else:
        _store_as(storage, value, at, KIND, MODE, WIDTH)
