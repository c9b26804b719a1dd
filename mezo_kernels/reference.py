"""Every op in eager PyTorch: the specification the compiled backends are tested against, on any device."""

from collections.abc import Iterator

import torch

from mezo_kernels.layout import FIRST_INDEX, TENSOR_ID
from mezo_kernels.philox import z_at

CHUNK = 1 << 20  # elements drawn at a time; bounds the int64 temporaries at about 100 MB


def standard_normal(seed: int, tensor_id: int, start: int, n_elements: int, distribution: str, device) -> torch.Tensor:
    """z of the elements start .. start + n_elements of one parameter."""
    index = torch.arange(start, start + n_elements, dtype=torch.int64, device=device)
    return torch.cat([z_at(seed, tensor_id, chunk, distribution) for chunk in index.split(CHUNK)])


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


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(1, -1) if tensor.dim() != 1 else tensor.unsqueeze(0)


def _scalar(value: float, device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


@torch.no_grad()
def perturb_(
    theta: list[torch.Tensor], geometry: list[torch.Tensor], scale: float, seed: int, distribution: str
) -> None:
    """theta <- theta + (scale * z)."""
    for tensor, row in zip(theta, geometry[0].tolist(), strict=True):
        matrix = _matrix(tensor)
        for at, index in _blocks(tensor, row):
            z = z_at(seed, row[TENSOR_ID], index, distribution)
            matrix[at] = matrix[at].float() + _scalar(scale, tensor.device) * z


@torch.no_grad()
def step_(theta, plus, minus, geometry, updates, next_seeds, eps: float, distribution: str) -> None:
    """Apply `updates`, a list of (seed, coefficient, decay), then write theta +- eps z(next_seed) for each pair.

    Args:
        theta: n tensors, read and written.
        plus, minus: n tensors for each of `next_seeds`, concatenated; written.
    """
    n = len(theta)
    for i, (tensor, row) in enumerate(zip(theta, geometry[0].tolist(), strict=True)):
        matrix = _matrix(tensor)
        for at, index in _blocks(tensor, row):
            value = matrix[at].float()
            for seed, coefficient, decay in updates:
                # theta <- theta * decay, then theta - (c * z)
                if decay != 1:
                    value = value * _scalar(decay, tensor.device)
                if coefficient != 0:
                    value = value - _scalar(coefficient, tensor.device) * z_at(
                        seed, row[TENSOR_ID], index, distribution
                    )
            matrix[at] = value
            for k, seed in enumerate(next_seeds):
                z = _scalar(eps, tensor.device) * z_at(seed, row[TENSOR_ID], index, distribution)
                _matrix(plus[k * n + i])[at] = value + z
                _matrix(minus[k * n + i])[at] = value - z


@torch.no_grad()
def rule_step_(
    theta, state, plus, minus, geometry, kind, constants, updates, next_seeds, eps, distribution
) -> None:  # fmt: skip
    """Apply (seed, weight, last, rate, decay, root) updates, then write theta +- eps z(next_seed) for each pair.

    Args:
        theta: n float32 tensors, read and written.
        state: n tensors for each of the rule's states, concatenated; read and written.
        plus, minus: n tensors for each of `next_seeds`, concatenated; written.
        kind, constants: as in `mezo_kernels.rules`.
        updates: the rows of a step follow each other, and the rule acts at its `last`.
    """
    n = len(theta)
    for i, (tensor, row) in enumerate(zip(theta, geometry[0].tolist(), strict=True)):
        matrix, kept = _matrix(tensor), [_matrix(state[k]) for k in range(i, len(state), n)]
        for at, index in _blocks(tensor, row):
            value, moments = matrix[at].clone(), [part[at].clone() for part in kept]
            g = torch.zeros_like(value)
            for seed, weight, last, *numbers in updates:
                # g <- g + (w * z)
                g = g + _scalar(weight, tensor.device) * z_at(seed, row[TENSOR_ID], index, distribution)
                if last:
                    value, moments = _apply_rule(kind, constants, value, moments, g, *numbers)
                    g = torch.zeros_like(value)
            matrix[at] = value
            for part, moment in zip(kept, moments, strict=True):
                part[at] = moment
            for k, seed in enumerate(next_seeds):
                z = _scalar(eps, tensor.device) * z_at(seed, row[TENSOR_ID], index, distribution)
                _matrix(plus[k * n + i])[at] = value + z
                _matrix(minus[k * n + i])[at] = value - z


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
