"""theta <- theta + scale * z, in place."""

import torch
import triton
import triton.language as tl

from mezo_kernels.philox import STREAMS
from mezo_kernels.triton.philox import draw, key
from mezo_kernels.triton.table import int32_halves, tables
from mezo_kernels.triton.tile import BY_ROW, FLAT, GENERAL, load, locate, parts, storage, store, tensor_id, tile_of


@triton.jit
def _perturb_tile(
    slot_ptr, row, unit, part, scale, k0, k1,
    STREAM: tl.constexpr, THETA: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    quad, at = locate(slot_ptr, row, unit, part, MODE, WIDTH, BLOCK_SIZE)

    theta_at = storage(slot_ptr, 0)
    theta = load(theta_at, at, THETA, MODE, WIDTH)

    # theta <- theta + (scale * z)
    theta = theta + scale * draw(quad, tensor_id(slot_ptr), k0, k1, STREAM, WIDTH)

    store(theta_at, theta, at, THETA, MODE, WIDTH)


@triton.jit(do_not_specialize=["columns", "seed_low", "seed_high"])
def _perturb_kernel(
    slots_ptr, tiles_ptr, columns, scale, seed_low, seed_high,
    STREAM: tl.constexpr, THETA: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slot_ptr, mode, row, unit = tile_of(slots_ptr, tiles_ptr, columns, pid)
    k0, k1 = key(seed_low), key(seed_high)
    if MODE == FLAT or mode == FLAT:
        _perturb_tile(slot_ptr, row, unit, 0, scale, k0, k1, STREAM, THETA, FLAT, WIDTH, BLOCK_SIZE)
    elif mode == BY_ROW:
        _perturb_tile(slot_ptr, row, unit, 0, scale, k0, k1, STREAM, THETA, BY_ROW, WIDTH, BLOCK_SIZE)
    else:
        for part in range(parts(slot_ptr, row, unit, PART, BLOCK_SIZE)):
            _perturb_tile(slot_ptr, row, unit, part, scale, k0, k1, STREAM, THETA, GENERAL, 4, PART)


def perturb_(
    theta: list[torch.Tensor], geometry: list[torch.Tensor], scale: float, seed: int, distribution: str
) -> None:
    """theta <- theta + (scale * z); arguments as in `reference`."""
    table = tables(theta, [], [], geometry)
    constants = {"STREAM": STREAMS[distribution], "THETA": table.theta}
    table.launch(_perturb_kernel, scale, *int32_halves(seed), **constants)
