"""Every op in eager PyTorch: the specification the compiled backends are tested against, on any device."""

from collections.abc import Iterator, Sequence

import torch

from mezo_kernels.layout import FIRST_INDEX, TENSOR_ID
from mezo_kernels.philox import z_at

CHUNK = 1 << 20  # elements drawn at a time; bounds the int64 temporaries at about 100 MB
TOGETHER = 1 << 15  # of several seeds: their temporaries stay in a core's cache


def standard_normal(
    seed: int, tensor_id: int, start: int, n_elements: int, distribution: str, device: torch.device
) -> torch.Tensor:
    """z of the elements start .. start + n_elements of one parameter.

    Args:
        seed: 0 <= seed < 2**64.
        tensor_id: number of the parameter, 0 <= tensor_id < 2**32; see `philox.tensor_id`.
        start: row-major index of the first element in the full parameter, >= 0.
        n_elements: how many, >= 0.
        distribution: "normal" or "rademacher".
        device: where the result is.
    Returns:
        float32 tensor (n_elements,).
    """
    index = torch.arange(start, start + n_elements, dtype=torch.int64, device=device)
    return torch.cat([z_at([seed], tensor_id, chunk, distribution)[0] for chunk in index.split(CHUNK)])


def _blocks(tensor: torch.Tensor, geometry: list[int]) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """Yield (position, index): blocks of the tensor's rows and columns and their elements' indices in full."""
    first_index, rows, cols, full_cols = geometry[FIRST_INDEX:]
    step_cols = min(cols, CHUNK)
    step_rows = max(1, CHUNK // step_cols)
    for row in range(0, rows, step_rows):
        r = torch.arange(row, min(rows, row + step_rows), dtype=torch.int64, device=tensor.device)
        for col in range(0, cols, step_cols):
            c = torch.arange(col, min(cols, col + step_cols), dtype=torch.int64, device=tensor.device)
            yield (slice(row, row + len(r)), slice(col, col + len(c))), first_index + r[:, None] * full_cols + c


def _draws(seeds: Sequence[int], tensor_id: int, index: torch.Tensor, distribution: str) -> Iterator[torch.Tensor]:
    """z of a block under each seed, in order; of a small block many are drawn at a time."""
    at_once = max(1, TOGETHER // index.numel())
    for i in range(0, len(seeds), at_once):
        yield from z_at(seeds[i : i + at_once], tensor_id, index, distribution)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(1, -1) if tensor.dim() != 1 else tensor.unsqueeze(0)


def _scalar(value: float, device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


@torch.no_grad()
def perturb_(
    theta: list[torch.Tensor], geometry: list[torch.Tensor], scale: float, seed: int, distribution: str
) -> None:
    """theta <- theta + (scale * z).

    Args:
        theta: n tensors, one a parameter, float32, bfloat16 or float16; read and written.
        geometry: one int64 tensor (n, 6), which elements they hold: see `layout.STRIDED` and the columns after it.
        scale: a float32 number.
        seed: of z, 0 <= seed < 2**64.
        distribution: "normal" or "rademacher".
    """
    for tensor, row in zip(theta, geometry[0].tolist(), strict=True):
        matrix = _matrix(tensor)
        for at, index in _blocks(tensor, row):
            (z,) = _draws([seed], row[TENSOR_ID], index, distribution)
            matrix[at] = matrix[at].float() + _scalar(scale, tensor.device) * z


@torch.no_grad()
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
    """Apply `updates` in order, then write theta +- eps z(next_seed) for each pair of plus and minus.

    Args:
        theta: n tensors, one a parameter; read and written. float32 where there are pairs.
        plus, minus: n tensors for each of `next_seeds`, concatenated; any dtype and strides; written. Without seeds
            they are left alone.
        geometry: of theta and of each plus and minus, as in `perturb_`; the first one counts.
        updates: (seed, coefficient, decay) each: theta * decay, then theta - (coefficient * z); float32 numbers.
        next_seeds: seed of each pair, 0 <= seed < 2**64.
        eps: a float32 number.
        distribution: "normal" or "rademacher".
    """
    n = len(theta)
    for i, (tensor, row) in enumerate(zip(theta, geometry[0].tolist(), strict=True)):
        matrix = _matrix(tensor)
        for at, index in _blocks(tensor, row):
            value, block = matrix[at].float(), (row[TENSOR_ID], index, distribution)
            z = _draws([seed for seed, coefficient, _ in updates if coefficient != 0], *block)
            for _, coefficient, decay in updates:
                # theta <- theta * decay, then theta - (c * z)
                if decay != 1:
                    value = value * _scalar(decay, tensor.device)
                if coefficient != 0:
                    value = value - _scalar(coefficient, tensor.device) * next(z)
            matrix[at] = value
            _write_pairs(plus[i::n], minus[i::n], at, value, eps, next_seeds, block)


def _write_pairs(plus, minus, at, value, eps, next_seeds, block) -> None:
    """theta +- eps z to a block of one parameter's copies, a seed for each pair.

    A plan has its pairs for good, and a step of it may have no seeds: they stay as they are then.
    """
    if not next_seeds:
        return
    eps = _scalar(eps, value.device)
    for above, below, z in zip(plus, minus, _draws(next_seeds, *block), strict=True):
        _matrix(above)[at] = value + eps * z
        _matrix(below)[at] = value - eps * z


@torch.no_grad()
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
    """Apply `updates` by a rule with state, then write theta +- eps z(next_seed) for each pair of plus and minus.

    Args:
        theta: n float32 tensors, one a parameter; read and written.
        state: n float32 tensors for each of the rule's states, concatenated; read and written.
        plus, minus: n tensors for each of `next_seeds`, concatenated; any dtype and strides; written.
        geometry: of theta, of each state and of each plus and minus, as in `perturb_`; the first one counts.
        kind: code of the rule, one of `rules.KINDS`.
        constants: six float32 numbers, `Rule.constants`.
        updates: (seed, weight, last, rate, decay, root) each, one a perturbation; those of a step follow each other.
            The estimate gains weight * z(seed). Where `last` is not 0 the rule acts on it once, by the other numbers.
        next_seeds: seed of each pair, 0 <= seed < 2**64.
        eps: a float32 number.
        distribution: "normal" or "rademacher".
    """
    n = len(theta)
    for i, (tensor, row) in enumerate(zip(theta, geometry[0].tolist(), strict=True)):
        matrix, kept = _matrix(tensor), [_matrix(state[k]) for k in range(i, len(state), n)]
        for at, index in _blocks(tensor, row):
            value, moments = matrix[at].clone(), [part[at].clone() for part in kept]
            g, block = torch.zeros_like(value), (row[TENSOR_ID], index, distribution)
            draws = _draws([seed for seed, *_ in updates], *block)
            for (_, weight, last, *numbers), z in zip(updates, draws, strict=True):
                # g <- g + (w * z)
                g = g + _scalar(weight, tensor.device) * z
                if last:
                    value, moments = _apply_rule(kind, constants, value, moments, g, *numbers)
                    g = torch.zeros_like(value)
            matrix[at] = value
            for part, moment in zip(kept, moments, strict=True):
                part[at] = moment
            _write_pairs(plus[i::n], minus[i::n], at, value, eps, next_seeds, block)


def _apply_rule(kind, constants, theta, moments, g, rate, decay, root):
    """One update of a block: (theta, moments) anew. The root is taken in float64 and rounded once: exact."""
    beta1, rest1, beta2, rest2, eps, l2 = (_scalar(value, theta.device) for value in constants)
    rate, decay, root = (_scalar(value, theta.device) for value in (rate, decay, root))
    if kind == 0:
        moments = [moments[0] * beta1 + g]
        step = moments[0]
    elif kind == 1:
        g = g + l2 * theta if l2 != 0 else g
        m, v = moments[0] * beta1 + rest1 * g, moments[1] * beta2 + rest2 * (g * g)
        moments = [m, v]
        step = m / (v.double().sqrt().float() * root + eps)
    else:
        step = (g > 0).float() - (g < 0).float()
    theta = theta * decay if decay != 1 else theta
    return theta - rate * step, moments
