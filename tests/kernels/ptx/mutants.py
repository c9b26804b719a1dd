"""Deliberate bugs, each of which must be found: in the kernels' source, in their tables, and in what the compiler made.

A bug is a name, a file of `mezo_kernels/triton/` or "ptx", and what takes the place of the first text that is there.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    where: str
    old: str
    new: str

    def __call__(self, text: str) -> str:
        assert self.where == "ptx" or self.old in text, f"{self.name}: {self.old!r} is not there"
        return text.replace(self.old, self.new, 1)


TILE = [
    Mutant("flat mask one lane too wide", "tile.py", "(lane < left)[:, None]", "(lane <= left)[:, None]"),
    Mutant("a row too many", "tile.py", "mask = (row < rows)[:, None]", "mask = (row <= rows)[:, None]"),
    Mutant("the early start forgotten", "tile.py", " + tl.load(slot_ptr + EARLY) + (WIDTH", " + (WIDTH"),
    Mutant("the next row begins a lane late", "tile.py", "tl.where(lane < left, 0", "tl.where(lane <= left, 0"),
    Mutant("an element before the row", "tile.py", "(element >= 0) & ", ""),
    Mutant("an element after the row", "tile.py", "(element < cols)", "(element <= cols)"),
    Mutant("a row's stride forgotten", "tile.py", "offset = tl.multiple_of(row * tl.load(storage_ptr + ROW_STRIDE)",
           "offset = tl.multiple_of(row * 0"),
    Mutant("a load without its mask", "tile.py", "tl.float32, at, MODE, WIDTH, WIDTH), mask=at[3])",
           "tl.float32, at, MODE, WIDTH, WIDTH))"),
]  # fmt: skip
TILE_MORE = [
    Mutant("flat column in units of 4", "tile.py", "lane * WIDTH, (lane", "lane * 4, (lane"),
    Mutant("a part too few", "tile.py", "return tl.cdiv(tl.minimum(left, BLOCK_SIZE // 4).to(tl.int32), PART // 4)",
           "return tl.minimum(left, BLOCK_SIZE // 4).to(tl.int32) // (PART // 4)"),
    Mutant("a row's index in 32 bits", "tile.py", "start = tl.load(slot_ptr + FIRST_INDEX) + row",
           "start = tl.load(slot_ptr + FIRST_INDEX).to(tl.int32) + row"),
    Mutant("a column's stride forgotten", "tile.py", "+ col * col_stride", "+ col"),
    Mutant("the second half goes to the first", "tile.py", "tl.store(pointers + 4, right", "tl.store(pointers, right"),
    Mutant("the slot of a tile in the mode's bits", "tile.py", "(slot >> 2) * columns", "(slot >> 3) * columns"),
    Mutant("flat mask one lane too narrow", "tile.py", "(lane < left)[:, None]", "(lane + 1 < left)[:, None]"),
    Mutant("flat z of one block for two", "tile.py", "(unit + lane) * (WIDTH // 4)", "(unit + lane)"),
    Mutant("flat origin forgotten", "tile.py", "at = unit * WIDTH, lane,", "at = unit * 0, lane,"),
    Mutant("flat first index forgotten", "tile.py", "(tl.load(slot_ptr + FIRST_INDEX) >> 2) + (unit", "(unit"),
    Mutant("the part of a tile forgotten", "tile.py", "lane = part * UNITS + tl.arange", "lane = tl.arange"),
    Mutant("the last unit of a row forgotten", "tile.py", " + (WIDTH - 1)) // WIDTH", ") // WIDTH"),
    Mutant("a row is skipped", "tile.py", "later_row + 1)", "later_row + 2)"),
    Mutant("the period of the rows cut short", "tile.py", "period = tl.minimum(units_per_row, MAX_UNITS)",
           "period = tl.minimum(units_per_row, 4)"),
    Mutant("a row of the shard for one of the parameter", "tile.py", "row * tl.load(slot_ptr + FULL_COLS)",
           "row * tl.load(slot_ptr + COLS)"),
    Mutant("the first element of a row left out", "tile.py", "(element >= 0)", "(element > 0)"),
    Mutant("a row starts at its Philox block", "tile.py", "col = unit * WIDTH - (start & 3)", "col = unit * WIDTH"),
    Mutant("an element's stride forgotten", "tile.py", "+ element * col_stride", "+ element"),
    Mutant("a promise of 32 elements", "tile.py", "+ col, WIDTH)", "+ col, WIDTH) // 32 * 32"),
    Mutant("the second half is the first", "tile.py", "tl.load(pointers + 4,", "tl.load(pointers,"),
    Mutant("bfloat16 for float16", "tile.py", "value = _load_as(storage, at, FP16, MODE, WIDTH)",
           "value = _load_as(storage, at, BF16, MODE, WIDTH)"),
]  # fmt: skip
TABLE = [
    Mutant("4 bytes called aligned", "table.py", "address % 16 == 0", "address % 4 == 0"),
    Mutant("any stride of rows called aligned", "table.py", "row_stride % width == 0)", "True)"),
    Mutant("any stride of columns called contiguous", "table.py", "and col_stride == 1", ""),
    Mutant("rows of broken units called whole", "table.py", "BY_ROW if cols % width == 0", "BY_ROW if cols"),
    Mutant("an early start called aligned", "table.py", "if early or not vectors", "if not vectors"),
    Mutant("rows inside a block called aligned", "table.py", "if aligned_rows else 3", "if aligned_rows else 0"),
    Mutant("a last unit called whole", "table.py", "if mode == FLAT and cols % width:", "if False:"),
    Mutant("rows apart called one row", "table.py", "all(row == cols * col for row, col in strides)", "True"),
    Mutant("the last tile left out", "table.py", "np.arange(0, rows * units_per_row,",
           "np.arange(0, rows * units_per_row - 1,"),
    Mutant("multiply and add fused", "table.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True'),
]  # fmt: skip
PHILOX = [
    Mutant("halves of a product exchanged", "philox.py", "{%c0, %c1}, %q", "{%c1, %c0}, %q"),
    Mutant("a key that stays", "philox.py", "add.u32 %k0, %k0, 0x9E3779B9;", ""),
    Mutant("another factor", "philox.py", "$2, 0xCD9E8D57", "$2, 0xD2511F53"),
    Mutant("a sum of the logarithm with its sign", "philox.py", "$3, 0fC0000000, %v", "$3, 0f40000000, %v"),
    Mutant("the root not corrected", "philox.py", "fma.rn.f32 %s, %d, %h, %s;", ""),
    Mutant("1 - w", "philox.py", "$1, 0fBF000000, 0f3F800000", "$1, 0fBF800000, 0f3F800000"),
    Mutant("a product fused that is not exact", "philox.py", "p = p * m + 3.3333331174e-1",
           "p = tl.fma(p, m, tl.full(p.shape, 3.3333331174e-1, tl.float32))"),
]  # fmt: skip
PTX = [
    Mutant("a sum for a difference", "ptx", "sub.rn.f32", "add.rn.f32"),
    Mutant("a shift without the sign", "ptx", "shr.s32", "shr.u32"),
    Mutant("a product that ptxas may contract", "ptx", "mul.rn.f32", "mul.f32"),
    Mutant("a root that is not exact", "ptx", "rsqrt.approx.ftz.f32", "sqrt.approx.ftz.f32"),
    Mutant("inline assembly that ptxas may contract", "ptx", "mul.rn.f32 %h,", "mul.f32 %h,"),
    Mutant("a mask's edge", "ptx", "setp.lt.s32", "setp.le.s32"),
    Mutant("another predicate of a store", "ptx", "@%p", "@!%p"),
    Mutant("a store of half", "ptx", "st.global.v4.b32", "st.global.v2.b32"),
    Mutant("a barrier left out", "ptx", "bar.sync", "// bar.sync"),
    Mutant("the low bits for the high", "ptx", "shr.u64", "shl.b64"),
    Mutant("another program's tile", "ptx", ", 24, ", ", 48, "),
    Mutant("bits rounded down", "ptx", "cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32"),
    Mutant("a load for which no thread is chosen", "ptx", "ld.global.v4.b32", "ld.global.v4.b64"),
]  # fmt: skip
