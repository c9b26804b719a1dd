"""z itself, of a run of elements of one parameter."""

import torch
import triton
import triton.language as tl

from mezo_kernels.philox import STREAMS
from mezo_kernels.triton.philox import draw, key
from mezo_kernels.triton.table import BLOCK_SIZE, LAUNCH, int32_halves, on_device


@triton.jit
def _int64(low, high):
    return (high.to(tl.int64) << 32) | key(low).to(tl.int64)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "tensor_id", "start_low", "start_high", "n_low", "n_high"])
def _standard_normal_kernel(
    z_ptr, seed_low, seed_high, tensor_id, start_low, start_high, n_low, n_high,
    STREAM: tl.constexpr, WHOLE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    start, n = _int64(start_low, start_high), _int64(n_low, n_high)
    unit = tl.arange(0, BLOCK_SIZE // 4)
    quad = (start >> 2) + pid * (BLOCK_SIZE // 4) + unit

    z = draw(quad, key(tensor_id), key(seed_low), key(seed_high), STREAM, 4)

    # pid BLOCK_SIZE elements from here; the first Philox block may begin up to 3 elements before `start`
    element = 4 * unit[:, None] + tl.arange(0, 4)[None, :]
    first = pid * BLOCK_SIZE
    if WHOLE:
        mask = (4 * unit < n - first)[:, None]
    else:
        first -= start & 3
        mask = (first + element >= 0) & (first + element < n)
    tl.store(z_ptr + first + element, z, mask=mask)


def standard_normal(
    seed: int, tensor_id: int, start: int, n_elements: int, distribution: str, device: torch.device
) -> torch.Tensor:
    """z of the elements start .. start + n_elements of one parameter, float32; arguments as in `reference`."""
    z = torch.empty(n_elements, dtype=torch.float32, device=device)
    if n_elements:
        numbers = (*int32_halves(seed), int32_halves(tensor_id)[0], *int32_halves(start), *int32_halves(n_elements))
        constants = {"STREAM": STREAMS[distribution], "WHOLE": start % 4 == 0 and n_elements % 4 == 0}
        grid = (triton.cdiv(start % 4 + n_elements, BLOCK_SIZE),)
        with on_device(z.device):
            _standard_normal_kernel[grid](z, *numbers, **constants, BLOCK_SIZE=BLOCK_SIZE, **LAUNCH)
    return z
