"""Tables on the device that let one launch cover all parameters, and the launch itself.

`slots`, int64, one row a parameter: its header (columns below), then (address, dtype, row stride, column stride) of
theta and of every plus and minus. `tiles`, int64, one row a program: (4 * slot + mode, row, unit), the unit of the
parameter it starts at. A large layout that is FLAT but for a few tiles has two lists of tiles, and takes two launches.
Tables depend on the layout alone: they are built once and kept until an address changes. Seeds and coefficients travel
apart (`step_values`, or kernel arguments), in types that do not depend on their values.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime.driver import driver

from mezo_kernels import layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# 16 elements a lane: enough loads in flight, few enough registers. The interpreter pays 8 ms a program instead
BLOCK_SIZE = 8192 if INTERPRETED else 2048
PART = BLOCK_SIZE if INTERPRETED else 512  # elements of a GENERAL tile at a time: addresses take registers too
# FLAT tiles from which on they get a launch of their own beside others: 2 million elements, some 10 us of a GPU
MANY = 1024
# HIP counts the threads of a grid in 32 bits; even, so that every part of the tiles is aligned to 16 bytes
MAX_PROGRAMS = 1 << 23
# every float32 operation of the z stream is rounded on its own, so nothing may be contracted
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}

# EARLY: a row that starts inside a Philox block begins up to 3 elements early, with those masked
TENSOR_ID, FIRST_INDEX, ROWS, COLS, FULL_COLS, EARLY = range(6)
HEADER, STORAGE = 6, 4  # columns of a slot's header, and of each of its storages
ADDRESS, DTYPE, ROW_STRIDE, COL_STRIDE = range(STORAGE)

# how a tile lies in storage
FLAT = 0  # aligned, contiguous in storage and in the full parameter: no division, 128-bit accesses
BY_ROW = 1  # aligned, contiguous rows in whole units: one division a unit, 128-bit accesses
GENERAL = 2  # anything: rows may start or end inside a Philox block; one access an element
ANY = 3  # of a kernel: it asks the table which of the three a tile is

# A layout of one dtype gets a kernel of that dtype; in any other the kernel branches on the storage's code, alike for
# all lanes of a program. That keeps one launch an op, for a tenth more instructions.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = 3


@dataclass(frozen=True)
class Launch:
    """Tiles that one kernel does.

    Args:
        tiles: on the device.
        mode: FLAT, or ANY where there are others too.
        width: elements of a unit.
    """

    tiles: torch.Tensor
    mode: int
    width: int


@dataclass(frozen=True)
class Table:
    """What launches need to know of a layout: device tables, and the constants that its kernels are compiled for.

    `compiled` holds these kernels: Triton takes 15 us to find one by its arguments.
    """

    slots: torch.Tensor
    launches: tuple[Launch, ...]
    theta: int  # dtype code
    target: int  # dtype code of plus and minus
    compiled: dict = field(default_factory=dict, compare=False)

    def launch(self, kernel: Callable, *arguments: Any, registers: int | None = None, **constants: int) -> None:
        """Run one program a tile: kernel(slots, tiles, columns of slots, *arguments, **constants).

        Args:
            kernel: a `triton.jit` function.
            arguments: tensors and numbers, which may differ from step to step.
            registers: of a thread at most, where all tiles are FLAT.
            constants: what the kernel is compiled for, beside the mode and width of the tiles; in its own order.
        Raises:
            ValueError: this Triton would change the bits of z on this device.
        """
        columns = self.slots.shape[1]
        with on_device(self.slots.device):
            keep_if_capturing(self, self.slots.device)
            for one in self.launches:
                own = constants | {"MODE": one.mode, "WIDTH": one.width, "BLOCK_SIZE": BLOCK_SIZE, "PART": PART}
                key = (kernel, *own.values())
                for tiles in one.tiles.split(MAX_PROGRAMS) if len(one.tiles) > MAX_PROGRAMS else (one.tiles,):
                    if compiled := self.compiled.get(key):
                        # what Triton would find again: no argument but these constants chooses another kernel
                        compiled[(len(tiles), 1, 1)](self.slots, tiles, columns, *arguments, *own.values())
                    else:
                        options = own | LAUNCH | (_limit(registers) if one.mode == FLAT else {})
                        self.compiled[key] = kernel[(len(tiles),)](self.slots, tiles, columns, *arguments, **options)


def capturing(device: torch.device) -> bool:
    """Whether what the current stream is given becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_in_graphs: dict[int, Any] = {}


def keep_if_capturing(read: Any, device: torch.device) -> None:
    """Keep, for good, what a graph that is being captured reads: nobody else knows that it does.

    Layouts, and the tables of theirs, may go while the graph and its tensors stay.
    """
    if capturing(device):
        _in_graphs[id(read)] = read


def _limit(registers: int | None) -> dict[str, int]:
    """The option of a launch that limits registers, on NVIDIA's GPUs before Blackwell, where they would not suffice."""
    if not registers or INTERPRETED:
        return {}
    target = driver.active.get_current_target()
    return {"maxnreg": registers} if target.backend == "cuda" and target.arch < 100 else {}


def on_device(device: torch.device):
    """Triton launches on the current device: make it the tensors' own."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    _check_compiler(device)
    return torch.cuda.device(device)


@functools.cache
def _check_compiler(device: torch.device) -> None:
    """Raise ValueError where the assembler of this Triton would change the bits of z."""
    if TRITON < (3, 7) and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0):
        # its ptxas 12.9 contracts mul.rn.f32x2 and add.rn.f32x2, whatever --fmad says; 13.1 does not
        raise ValueError(
            f"Triton {triton.__version__} fuses multiplications and additions on {torch.cuda.get_device_name(device)}, "
            "which changes z; install triton>=3.7 or pass backend='reference'"
        )


def build(
    theta: list[torch.Tensor], plus: list[torch.Tensor], minus: list[torch.Tensor], geometry: torch.Tensor
) -> Table:
    """The table of theta with its plus and minus.

    Args:
        theta: n tensors, one a parameter.
        plus, minus: n tensors for each pair, concatenated.
        geometry: int64 (n, 6), which elements theta holds: `ParamLayout.geometry`.
    Raises:
        ValueError: a CUDA graph is being captured, which cannot record the copy of a new table.
    """
    if capturing(theta[0].device):
        raise ValueError("a capture needs its table before: call the op once with these tensors, then capture it")
    n = len(theta)
    targets = [[t for k in range(i, len(plus), n) for t in (plus[k], minus[k])] for i in range(n)]
    rows = [row[layout.TENSOR_ID :] for row in geometry.tolist()]
    blocks = [_block(rows[i], [theta[i], *targets[i]]) for i in range(n)]
    slots = [[*block.header, *(value for storage in block.storages for value in storage)] for block in blocks]
    device = theta[0].device
    return Table(
        slots=torch.tensor(slots, dtype=torch.int64, device="cpu").to(device),
        launches=tuple(Launch(torch.from_numpy(tiles).to(device), *kind) for tiles, *kind in _launches(blocks)),
        theta=dtype(theta),
        target=dtype([*plus, *minus] or theta),
    )


tables = layout.AddressCache(build)


@dataclass(frozen=True)
class _Block:
    """One parameter: (tensor_id, first_index, rows, cols, full_cols, early), and its storages as in `slots`."""

    header: tuple[int, ...]
    storages: list[tuple[int, int, int, int]]

    def mode(self, width: int) -> int:
        rows, cols, early = self.header[ROWS], self.header[COLS], self.header[EARLY]
        vectors = all(
            address % 16 == 0 and col_stride == 1 and (rows == 1 or row_stride % width == 0)
            for address, _, row_stride, col_stride in self.storages
        )
        if early or not vectors:
            return GENERAL
        return FLAT if rows == 1 else BY_ROW if cols % width == 0 else GENERAL


def _block(row: list[int], tensors: list[torch.Tensor]) -> _Block:
    """Rows that follow each other, in the full parameter and in every storage, become one long row."""
    tensor_id, first_index, rows, cols, full_cols = row
    strides = [layout.matrix_view(tensor)[2:] for tensor in tensors]
    if rows == 1 or (full_cols == cols and all(row == cols * col for row, col in strides)):
        rows, cols, full_cols = 1, rows * cols, rows * cols
    aligned_rows = rows == 1 or full_cols % 4 == 0
    early = first_index % 4 if aligned_rows else 3
    storages = [(t.data_ptr(), DTYPES[t.dtype], *s) for t, s in zip(tensors, strides, strict=True)]
    return _Block((tensor_id, first_index, rows, cols, full_cols, early), storages)


def _launches(blocks: list[_Block]) -> list[tuple[np.ndarray, int, int]]:
    """(tiles, mode, width) of each launch.

    One parameter of odd size must not cost all others their kernel, which needs fewer registers and, in 16 bits, makes
    128-bit accesses. Below MANY tiles a second launch would cost more.
    """
    wide, width = 8 if _narrow(blocks) else 4, _width(blocks)
    fast = [_tiles(i, FLAT, block, wide) for i, block in enumerate(blocks) if block.mode(wide) == FLAT]
    flat = np.concatenate([np.zeros((0, 3), np.int64), *fast])
    last, flat = flat[flat[:, 0] & 3 != FLAT], flat[flat[:, 0] & 3 == FLAT]
    rest = [(i, block) for i, block in enumerate(blocks) if block.mode(wide) != FLAT]
    if len(flat) < MANY or not (rest or len(last)):
        tiles = np.concatenate([_tiles(i, block.mode(width), block, width) for i, block in enumerate(blocks)])
        return [(tiles, ANY if (tiles[:, 0] & 3).any() else FLAT, width)]
    width = _width([block for _, block in rest])
    others = [last, *(_tiles(i, block.mode(width), block, width) for i, block in rest)]
    return [(flat, FLAT, wide), (np.concatenate(others), ANY, width)]


def _narrow(blocks: list[_Block]) -> bool:
    return any(storage[DTYPE] != DTYPES[torch.float32] for block in blocks for storage in block.storages)


def _width(blocks: list[_Block]) -> int:
    """Elements of a unit: 8 where 16-bit storage wants them for 128-bit accesses, unless it makes a block GENERAL."""
    return 8 if _narrow(blocks) and all(block.mode(8) == block.mode(4) for block in blocks) else 4


def _tiles(slot: int, mode: int, block: _Block, width: int) -> np.ndarray:
    """The slot's rows of `tiles`. GENERAL tiles count in units of 4, which waste less on short rows."""
    rows, cols, early = block.header[ROWS], block.header[COLS], block.header[EARLY]
    width = 4 if mode == GENERAL else width
    units_per_row = -(-(cols + early) // width)
    start = np.arange(0, rows * units_per_row, BLOCK_SIZE // width)
    tiles = np.stack([np.full_like(start, 4 * slot + mode), *np.divmod(start, units_per_row)], axis=1)
    if mode == FLAT and cols % width:
        # the last unit is not whole
        tiles[-1, [0, 2]] = 4 * slot + GENERAL, tiles[-1, 2] * width // 4
    return tiles


def dtype(tensors: list[torch.Tensor]) -> int:
    """Code of the tensors' dtype; MIXED where they have several."""
    codes = {DTYPES[tensor.dtype] for tensor in tensors}
    return codes.pop() if len(codes) == 1 else MIXED


def int32_halves(value: int) -> tuple[int, int]:
    """The low and the high 32 bits of 0 <= value < 2**64, as signed int32: one kernel signature for every value.

    Triton types a Python integer by its size, so that 2**31 would compile a second variant in mid-run.

    >>> int32_halves(2**63 + 5)
    (5, -2147483648)
    """
    return tuple(np.array([value], np.uint64).view(np.int32).tolist())


def bits(*numbers: float) -> np.ndarray:
    """float32 numbers as kernels take them, two in each uint64, the first one low.

    >>> [f"{both:016x}" for both in bits(1.0, -2.0).tolist()]
    ['c00000003f800000']
    """
    return np.array(numbers, np.float32).view(np.uint64)


def step_values(updates: list[tuple[int, float, float]], next_seeds: list[int], eps: float) -> np.ndarray:
    """Per-step values, uint64 [updates + pairs, 2]: (seed, coefficient bits | decay bits << 32), then (seed, eps bits).

    Args:
        updates: (seed, coefficient, decay) each, float32 numbers.
        next_seeds: seed of each pair.
        eps: float32.
    """
    values = np.zeros((max(1, len(updates) + len(next_seeds)), 2), np.uint64)
    values[: len(updates) + len(next_seeds), 0] = [*(seed for seed, _, _ in updates), *next_seeds]
    values[: len(updates), 1] = bits(*(number for update in updates for number in update[1:]))
    values[len(updates) :, 1] = bits(eps, 0.0)
    return values


def values_on(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Per-step values (uint64) on the device as int64, without waiting for it; right in a captured graph too."""
    values = torch.from_numpy(values.view(np.int64))
    if device.type != "cuda":
        return values
    if capturing(device):
        # a captured copy would read host memory again at every replay; a captured fill carries its value. A graph whose
        # values change from replay to replay has them in a buffer: `Plan.recorded`
        captured = torch.empty(values.shape, dtype=torch.int64, device=device)
        for cell, value in zip(captured.view(-1).unbind(), values.view(-1).tolist(), strict=True):
            cell.fill_(value)
        return captured
    # pinned, so that the copy does not wait for the device; torch keeps the buffer until it has been read
    return values.pin_memory().to(device, non_blocking=True)
