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
        theta, start: float32 tensors of equal shapes and devices, one a parameter; `start` is theta_0.
        decay: a float32 number; a Python float is rounded to float32, as those of `step_` are.
    Raises:
        ValueError: there is not a `start` of the same shape, on the same device, for each theta, or one of them is not
            float32. Nothing has been changed then.

    >>> theta, start = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0])
    >>> anchored_decay_([theta], [start], 0.75)
    >>> theta
    tensor([1., 2.])
    """
    pairs = list(zip(theta, start, strict=True))
    for n, (tensor, anchor) in enumerate(pairs):
        same = tensor.shape == anchor.shape and tensor.device == anchor.device
        if not same or {tensor.dtype, anchor.dtype} != {torch.float32}:
            found = " and ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (tensor, anchor))
            raise ValueError(f"theta and start of parameter {n} must be float32 of one shape and device, got {found}")
    decay = float32(decay)
    for tensor, anchor in pairs if decay != 1 else ():
        tensor.mul_(decay).add_(anchor * float32(1 - decay))
