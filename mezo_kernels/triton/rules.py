"""Steps by a rule with state: read the master and its state once, update in registers, write all once."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl

from mezo_kernels.layout import AddressCache
from mezo_kernels.philox import STREAMS
from mezo_kernels.triton import table
from mezo_kernels.triton.step import decayed, draw_of
from mezo_kernels.triton.tile import BY_ROW, FLAT, GENERAL, load, locate, parts, storage, store, tensor_id, tile_of

MOMENTUM, ADAM = tl.constexpr(0), tl.constexpr(1)
# int64 a row: seed, (weight, last), (rate, decay), (root, -), as bits of float32; of a pair seed, (eps, -), -, -
COLUMNS = tl.constexpr(4)
# of a thread at most, by rule (momentum, Adam, sign): the fewest at which the assembler does not spill; Triton 3.6's
# spills from 80. By itself it takes 126 for momentum, for one instruction of a hundred less: fewer warps find room
REGISTERS = (88 if table.TRITON < (3, 7) else 80, None, None)


@triton.jit
def _low(value_ptr):
    return tl.load(value_ptr).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _high(value_ptr):
    return (tl.load(value_ptr) >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _rule_tile(
    slot_ptr, row, unit, part, values_ptr, n_rows, n_pairs, beta1, rest1, beta2, rest2, adam_eps, l2,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAM: tl.constexpr, TARGET: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    quad, at = locate(slot_ptr, row, unit, part, MODE, WIDTH, BLOCK_SIZE)
    tag = tensor_id(slot_ptr)
    theta_at = storage(slot_ptr, 0)
    theta = load(theta_at, at, 0, MODE, WIDTH)
    g = tl.zeros_like(theta)
    m, v = g, g
    if STATES > 0:
        m = load(storage(slot_ptr, 1), at, 0, MODE, WIDTH)
    if STATES > 1:
        v = load(storage(slot_ptr, 2), at, 0, MODE, WIDTH)

    for k in range(n_rows):
        row_ptr = values_ptr + COLUMNS * k
        # g <- g + (w * z)
        g = g + _low(row_ptr + 1) * draw_of(row_ptr, quad, tag, STREAM, WIDTH)
        if _high(row_ptr + 1) != 0.0:
            rate, decay, root = _low(row_ptr + 2), _high(row_ptr + 2), _low(row_ptr + 3)
            if RULE == MOMENTUM:
                m = m * beta1 + g
                step = m
            elif RULE == ADAM:
                if l2 != 0.0:
                    g = g + l2 * theta
                m = m * beta1 + rest1 * g
                v = v * beta2 + rest2 * (g * g)
                step = tl.div_rn(m, tl.sqrt_rn(v) * root + adam_eps)
            else:
                step = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))
            if decay != 1.0:
                theta = decayed(theta, decay)
            theta = theta - rate * step
            g = tl.zeros_like(theta)
    if n_rows > 0:
        # addresses of the state are loaded again: kept since its load, they would cost Adam 30 registers
        store(theta_at, theta, at, 0, MODE, WIDTH)
        if STATES > 0:
            store(storage(slot_ptr, 1), m, at, 0, MODE, WIDTH)
        if STATES > 1:
            store(storage(slot_ptr, 2), v, at, 0, MODE, WIDTH)

    FIRST: tl.constexpr = 3 if STATES > 0 else 1
    for k in range(n_pairs):
        # plus, minus <- theta +- (eps * z)
        row_ptr = values_ptr + COLUMNS * (n_rows + k)
        move = _low(row_ptr + 1) * draw_of(row_ptr, quad, tag, STREAM, WIDTH)
        plus_at, minus_at = storage(slot_ptr, FIRST + 2 * k), storage(slot_ptr, FIRST + 1 + 2 * k)
        store(plus_at, theta + move, at, TARGET, MODE, WIDTH)
        store(minus_at, theta - move, at, TARGET, MODE, WIDTH)


@triton.jit(do_not_specialize=["columns", "n_rows", "n_pairs"])
def _rule_step_kernel(
    slots_ptr, tiles_ptr, columns, values_ptr, n_rows, n_pairs, beta1, rest1, beta2, rest2, adam_eps, l2,
    RULE: tl.constexpr, STATES: tl.constexpr, STREAM: tl.constexpr, TARGET: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slot_ptr, mode, row, unit = tile_of(slots_ptr, tiles_ptr, columns, pid)
    work = values_ptr, n_rows, n_pairs, beta1, rest1, beta2, rest2, adam_eps, l2
    if MODE == FLAT or mode == FLAT:
        _rule_tile(slot_ptr, row, unit, 0, *work, RULE, STATES, STREAM, TARGET, FLAT, WIDTH, BLOCK_SIZE)
    elif mode == BY_ROW:
        _rule_tile(slot_ptr, row, unit, 0, *work, RULE, STATES, STREAM, TARGET, BY_ROW, WIDTH, BLOCK_SIZE)
    else:
        for part in range(parts(slot_ptr, row, unit, PART, BLOCK_SIZE)):
            _rule_tile(slot_ptr, row, unit, part, *work, RULE, STATES, STREAM, TARGET, GENERAL, 4, PART)


def _build(theta, first, second, geometry: torch.Tensor) -> table.Table:
    """As `table.build`, where the first pair is state, float32: the targets' dtype is that of the others."""
    n = len(theta)
    return replace(table.build(theta, first, second, geometry), target=table.dtype([*first[n:], *second[n:]] or theta))


_tables, _tables_with_state = AddressCache(table.build), AddressCache(_build)


def rule_step_(
    theta: list[torch.Tensor],
    state: list[torch.Tensor],
    plus: list[torch.Tensor],
    minus: list[torch.Tensor],
    geometry: list[torch.Tensor],
    kind: int,
    constants: list[float],
    updates: list[tuple[int, float, float, float, float, float]],
    next_seeds: list[int],
    eps: float,
    distribution: str,
) -> None:
    """Apply updates by a rule, then write theta +- eps z(next_seed) for each pair; arguments as in `reference`."""
    prepare_rule_step(theta, state, plus, minus, geometry, kind, constants)(updates, next_seeds, eps, distribution)


def prepare_rule_step(
    theta: list[torch.Tensor],
    state: list[torch.Tensor],
    plus: list[torch.Tensor],
    minus: list[torch.Tensor],
    geometry: list[torch.Tensor],
    kind: int,
    constants: list[float],
) -> Callable:
    """`rule_step_` of these tensors, which must stay where they are: a function of its other arguments."""
    n = len(theta)
    if state:
        made = _tables_with_state(theta, [*state[:n], *plus], [*state[-n:], *minus], geometry)
    else:
        made = _tables(theta, plus, minus, geometry)
    return functools.partial(_rule_step, made, kind, len(state) // n, constants)


def _rule_step(made: table.Table, kind, states, constants, updates, next_seeds, eps, distribution) -> None:
    values = table.values_on(_values(updates, next_seeds, eps), made.slots.device)
    made.launch(
        _rule_step_kernel, values, len(updates), len(next_seeds), *constants,
        registers=REGISTERS[kind], RULE=kind, STATES=states, STREAM=STREAMS[distribution], TARGET=made.target,
    )  # fmt: skip


def _values(updates: list[tuple], next_seeds: list[int], eps: float) -> np.ndarray:
    """Per-step values, uint64 [updates + pairs, COLUMNS]."""
    n, values = len(updates), np.zeros((max(1, len(updates) + len(next_seeds)), 4), np.uint64)
    values[: n + len(next_seeds), 0] = [*(update[0] for update in updates), *next_seeds]
    numbers = np.zeros((n, 6), np.float32)
    numbers[:, :5] = np.array([update[1:] for update in updates], np.float32).reshape(-1, 5)
    values[:n, 1:] = numbers.view(np.uint64)
    values[n:, 1] = table.bits(eps, 0.0)
    return values
