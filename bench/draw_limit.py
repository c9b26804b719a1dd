"""What bounds every op on a GPU: z drawn as the kernels draw it, and nothing kept of it but the sum of each four."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from mezo_kernels.triton.philox import key, normal_quad
from mezo_kernels.triton.table import BLOCK_SIZE, LAUNCH


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _draw_kernel(sums_ptr, seed_low, seed_high, BLOCK_SIZE: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    quad = pid * (BLOCK_SIZE // 4) + tl.arange(0, BLOCK_SIZE // 4)
    tag = tl.zeros_like(quad).to(tl.uint32)

    z0, z1, z2, z3 = normal_quad(quad, tag, key(seed_low), key(seed_high))

    tl.store(sums_ptr + quad, (z0 + z1) + (z2 + z3))


def drawer(elements: int, device: str) -> tuple[Callable, torch.Tensor]:
    """Draws so many z once, at an addition and a byte for each.

    Args:
        elements: a multiple of a program's.
        device: where.
    Returns:
        a function that does it, and the sums of each four z in turn that it leaves, float32.
    """
    sums = torch.empty(elements // 4, device=device)

    def run() -> None:
        _draw_kernel[(elements // BLOCK_SIZE,)](sums, 1, 0, BLOCK_SIZE=BLOCK_SIZE, **LAUNCH)

    return run, sums
