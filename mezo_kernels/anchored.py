"""Decay towards where a run began, in plain PyTorch: elementwise, so the bits are the same on every device."""

from collections.abc import Sequence

import torch

from mezo_kernels.dispatch import float32


@torch.no_grad()
def anchored_decay_(theta: Sequence[torch.Tensor], start: Sequence[torch.Tensor], decay: float) -> None:
    """theta <- (theta * decay) + ((1 - decay) * theta_0), in place: theta - lambda (theta - theta_0), decay 1 - lambda.

    Every float32 operation is rounded on its own. A decay of 1 changes no bit. It is weight decay towards the starting
    point, L2-SP (Li et al. 2018, arXiv 1802.01483), decoupled.

    Args:
        theta, start: float32 tensors of equal shapes, one a parameter; `start` is theta_0.
        decay: a float32 number; a Python float is rounded to float32, as those of `step_` are.

    >>> theta, start = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0])
    >>> anchored_decay_([theta], [start], 0.75)
    >>> theta
    tensor([1., 2.])
    """
    decay = float32(decay)
    for tensor, anchor in zip(theta, start, strict=True) if decay != 1 else ():
        tensor.mul_(decay).add_(anchor * float32(1 - decay))
