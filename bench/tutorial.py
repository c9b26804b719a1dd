"""theta <- theta + scale * z as Triton's tutorials write it: `tl.randn` by element, one launch a tensor."""

import torch
import triton
import triton.language as tl


@triton.jit
def _perturb_kernel(theta_ptr, scale, seed, n_elements, BLOCK_SIZE: tl.constexpr):
    pid = tl.program_id(0)
    offsets = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements

    theta = tl.load(theta_ptr + offsets, mask=mask)

    theta = theta + scale * tl.randn(seed, offsets)

    tl.store(theta_ptr + offsets, theta, mask=mask)


def perturb(theta: torch.Tensor, scale: float, seed: int) -> None:
    """In place, contiguous tensors only."""
    n_elements = theta.numel()
    _perturb_kernel[(triton.cdiv(n_elements, 1024),)](theta, scale, seed, n_elements, BLOCK_SIZE=1024)
