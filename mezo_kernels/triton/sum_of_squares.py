"""The sum of z**2 over a layout, in float64: the squared length of a perturbation."""

import torch
import triton
import triton.language as tl

from mezo_kernels.philox import STREAMS
from mezo_kernels.triton.philox import draw, key
from mezo_kernels.triton.table import int32_halves, tables
from mezo_kernels.triton.tile import BY_ROW, FLAT, GENERAL, locate, parts, tensor_id, tile_of


@triton.jit
def _sum_of_tile(
    slot_ptr, row, unit, part, k0, k1,
    STREAM: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    quad, at = locate(slot_ptr, row, unit, part, MODE, WIDTH, BLOCK_SIZE)
    z = draw(quad, tensor_id(slot_ptr), k0, k1, STREAM, WIDTH).to(tl.float64)
    return tl.sum(tl.reshape(tl.where(at[3], z * z, 0.0), [BLOCK_SIZE]), 0)


@triton.jit(do_not_specialize=["columns", "seed_low", "seed_high"])
def _sum_of_squares_kernel(
    slots_ptr, tiles_ptr, columns, sums_ptr, seed_low, seed_high,
    STREAM: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slot_ptr, mode, row, unit = tile_of(slots_ptr, tiles_ptr, columns, pid)
    k0, k1 = key(seed_low), key(seed_high)
    total = tl.full((), 0.0, tl.float64)
    if MODE == FLAT or mode == FLAT:
        total = _sum_of_tile(slot_ptr, row, unit, 0, k0, k1, STREAM, FLAT, WIDTH, BLOCK_SIZE)
    elif mode == BY_ROW:
        total = _sum_of_tile(slot_ptr, row, unit, 0, k0, k1, STREAM, BY_ROW, WIDTH, BLOCK_SIZE)
    else:
        for part in range(parts(slot_ptr, row, unit, PART, BLOCK_SIZE)):
            total += _sum_of_tile(slot_ptr, row, unit, part, k0, k1, STREAM, GENERAL, 4, PART)
    tl.store(sums_ptr + pid, total)


def sum_of_squares(theta, geometry, seed, distribution) -> torch.Tensor:
    """Sum over all elements of z**2, a float64 scalar on theta's device.

    A second, small launch adds the sums of the tiles: atomic additions would not give the same bits every time.
    """
    table = tables(theta, [], [], geometry)
    sums = torch.empty(len(table.tiles), dtype=torch.float64, device=theta[0].device)
    table.launch(_sum_of_squares_kernel, sums, *int32_halves(seed), STREAM=STREAMS[distribution])
    return sums.sum()
