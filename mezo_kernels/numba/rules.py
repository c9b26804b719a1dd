"""Steps by a rule with state, compiled for CPUs with numba: the loops of `step.py`, and the rule on each chunk."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numba import float32, prange

from mezo_kernels.layout import AddressCache
from mezo_kernels.numba import step
from mezo_kernels.numba.draw import (
    GROUPS,
    MOVED,
    SCRATCH,
    VALUE,
    F,
    _aligned,
    _array,
    _draw_batch,
    _end_of_batch,
    _load_batch,
    _number_blocks,
    _store_batch,
    compiled,
)
from mezo_kernels.numba.step import PAIR, THETA, _subtract
from mezo_kernels.philox import STREAMS

# beside the scratch of `step.py`: the estimate, and the two states
ESTIMATE, FIRST, SECOND, RULE_SCRATCH = (SCRATCH + 4 * GROUPS * k for k in range(4))
MOMENTUM, ADAM = 0, 1
WEIGHT, LAST, RATE, DECAY, ROOT = range(5)  # columns of an update's numbers
STATE = THETA  # the states lie where `_build_items` puts the first pair
_ZERO, _ONE = F(0), F(1)


@compiled()
def _clear(address, n):
    value = _array(address, 1, n, np.float32)
    for j in range(n):
        value[j] = _ZERO


@compiled()
def _rule(kind, scratch, n, constants, rate, decay, root):
    """One update of a chunk: theta and its states, in float32, each operation rounded on its own."""
    theta, g = _array(scratch + 4 * VALUE, 1, n, np.float32), _array(scratch + 4 * ESTIMATE, 1, n, np.float32)
    m, v = _array(scratch + 4 * FIRST, 1, n, np.float32), _array(scratch + 4 * SECOND, 1, n, np.float32)
    beta1, rest1, beta2, rest2, eps, l2 = (
        constants[0], constants[1], constants[2], constants[3], constants[4], constants[5],
    )  # fmt: skip
    if kind == ADAM and l2 != _ZERO:
        for j in range(n):
            g[j] = g[j] + l2 * theta[j]
    if kind == MOMENTUM:
        for j in range(n):
            m[j] = m[j] * beta1 + g[j]
            g[j] = m[j]
    elif kind == ADAM:
        for j in range(n):
            m[j] = m[j] * beta1 + rest1 * g[j]
            v[j] = v[j] * beta2 + rest2 * (g[j] * g[j])
            g[j] = m[j] / (float32(math.sqrt(v[j])) * root + eps)
    else:
        for j in range(n):
            g[j] = _ONE if g[j] > _ZERO else (-_ONE if g[j] < _ZERO else _ZERO)
    if decay != _ONE:
        for j in range(n):
            theta[j] = theta[j] * decay
    for j in range(n):
        theta[j] = theta[j] - rate * g[j]


@compiled()
def _rule_items(items, lo, hi, buffer, thread, kind, states, constants, seeds, numbers, next_seeds, eps, stream):
    scratch = _aligned(buffer) + thread * 4 * RULE_SCRATCH
    value, moved, estimate = scratch + 4 * VALUE, scratch + 4 * MOVED, scratch + 4 * ESTIMATE
    while lo < hi:
        end = _end_of_batch(items, lo, hi, stream)
        n = _number_blocks(scratch, items, lo, end)
        _load_batch(value, items, lo, end, 0)
        for s in range(states):
            _load_batch(scratch + 4 * (FIRST + s * (SECOND - FIRST)), items, lo, end, STATE + 3 * s)
        _clear(estimate, n)
        for k in range(seeds.shape[0]):
            # g <- g + (w * z)
            z = _draw_batch(scratch, items, lo, end, n, stream, seeds[k, 0], seeds[k, 1])
            _subtract(estimate, estimate, -numbers[k, WEIGHT], z, n)
            if numbers[k, LAST] != _ZERO:
                _rule(kind, scratch, n, constants, numbers[k, RATE], numbers[k, DECAY], numbers[k, ROOT])
                _clear(estimate, n)
        if seeds.shape[0]:
            _store_batch(value, items, lo, end, 0)
            for s in range(states):
                _store_batch(scratch + 4 * (FIRST + s * (SECOND - FIRST)), items, lo, end, STATE + 3 * s)
        for p in range(next_seeds.shape[0]):
            # theta + eps z = theta - (-eps) z
            at = THETA + (p + (1 if states else 0)) * PAIR
            z = _draw_batch(scratch, items, lo, end, n, stream, next_seeds[p, 0], next_seeds[p, 1])
            _subtract(moved, value, -eps, z, n)
            _store_batch(moved, items, lo, end, at)
            _subtract(moved, value, eps, z, n)
            _store_batch(moved, items, lo, end, at + 3)
        lo = end


@compiled(parallel=True)
def _rule_parallel(threads, items, buffer, kind, states, constants, seeds, numbers, next_seeds, eps, stream):
    n = items.shape[0]
    for t in prange(threads):
        lo, hi = t * n // threads, (t + 1) * n // threads
        _rule_items(items, lo, hi, buffer, t, kind, states, constants, seeds, numbers, next_seeds, eps, stream)


_items = AddressCache(step._build_items)


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
    n, states = len(theta), len(state) // len(theta)
    # a rule's states (m, v) stand before the first pair; momentum's one state stands twice
    items, n_elements = _items(theta, [*state[:n], *plus], [*state[-n:], *minus] if state else minus, geometry)
    return functools.partial(_rule_step, items, n_elements, kind, states, np.array(constants, F))


def _rule_step(items, n_elements, kind, states, constants, updates, next_seeds, eps, distribution) -> None:
    numbers = np.array([row[1:] for row in updates], F).reshape(-1, 5)
    passes = step._keys([row[0] for row in updates]), numbers, step._keys(next_seeds)
    arguments = (kind, states, constants, *passes, F(eps), STREAMS[distribution])
    threads = step._threads(items, n_elements * max(1, len(updates) + len(next_seeds)))
    if threads == 1:
        _rule_items(items, 0, len(items), np.empty(RULE_SCRATCH + 16, F), 0, *arguments)
    else:
        with step._pool:
            _rule_parallel(threads, items, np.empty(threads * RULE_SCRATCH + 16, F), *arguments)
