"""One pass over the master: apply updates in registers, write theta once, write theta +- eps z for each next pair."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from mezo_kernels.philox import STREAMS
from mezo_kernels.triton.philox import draw
from mezo_kernels.triton.table import Table, step_values, tables
from mezo_kernels.triton.tile import BY_ROW, FLAT, GENERAL, load, locate, parts, store, tensor_id, tile_of


@triton.jit
def _draw(quad, slot_ptr, value_ptr, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    seed = tl.load(value_ptr)
    return draw(quad, tensor_id(slot_ptr), seed.to(tl.uint32), (seed >> 32).to(tl.uint32), STREAM, WIDTH)


@triton.jit
def _step_tile(
    slot_ptr, row, unit, part, values_ptr, n_updates, n_pairs, eps,
    STREAM: tl.constexpr, THETA: tl.constexpr, TARGET: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    quad, at = locate(slot_ptr, row, unit, part, MODE, WIDTH, BLOCK_SIZE)

    theta = load(slot_ptr, 0, at, THETA, MODE, WIDTH)

    for k in range(n_updates):
        # theta <- theta * decay, then theta - (c * z); a decay of 1 and a coefficient of 0 change no bit
        numbers = tl.load(values_ptr + 2 * k + 1)
        coefficient = numbers.to(tl.int32).to(tl.float32, bitcast=True)
        decay = (numbers >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if decay != 1.0:
            theta = theta * decay
        if coefficient != 0.0:
            theta = theta - coefficient * _draw(quad, slot_ptr, values_ptr + 2 * k, STREAM, WIDTH)
    if n_updates > 0:
        store(slot_ptr, 0, theta, at, THETA, MODE, WIDTH)

    for k in range(n_pairs):
        # plus, minus <- theta +- (eps * z)
        move = eps * _draw(quad, slot_ptr, values_ptr + 2 * (n_updates + k), STREAM, WIDTH)
        store(slot_ptr, 1 + 2 * k, theta + move, at, TARGET, MODE, WIDTH)
        store(slot_ptr, 2 + 2 * k, theta - move, at, TARGET, MODE, WIDTH)


@triton.jit(do_not_specialize=["columns", "n_updates", "n_pairs"])
def _step_kernel(
    slots_ptr, tiles_ptr, columns, values_ptr, n_updates, n_pairs, eps,
    STREAM: tl.constexpr, THETA: tl.constexpr, TARGET: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slot_ptr, mode, row, unit = tile_of(slots_ptr, tiles_ptr, columns, pid)
    work = values_ptr, n_updates, n_pairs, eps
    if MODE == FLAT or mode == FLAT:
        _step_tile(slot_ptr, row, unit, 0, *work, STREAM, THETA, TARGET, FLAT, WIDTH, BLOCK_SIZE)
    elif mode == BY_ROW:
        _step_tile(slot_ptr, row, unit, 0, *work, STREAM, THETA, TARGET, BY_ROW, WIDTH, BLOCK_SIZE)
    else:
        for part in range(parts(slot_ptr, row, unit, PART, BLOCK_SIZE)):
            _step_tile(slot_ptr, row, unit, part, *work, STREAM, THETA, TARGET, GENERAL, 4, PART)


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
    return functools.partial(_step, tables(theta, plus, minus, geometry))


def _step(table: Table, updates, next_seeds, eps, distribution) -> None:
    values = step_values(updates, next_seeds, table.slots.device)
    constants = {"STREAM": STREAMS[distribution], "THETA": table.theta, "TARGET": table.target}
    table.launch(_step_kernel, values, len(updates), len(next_seeds), eps, **constants)
