"""The z stream, version 1, in eager PyTorch: the definition every compiled backend must reproduce bit for bit.

z is a pure function of (seed, parameter name, element index). Words come from Philox4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), normals from Box and Muller (1958) with the single-precision
polynomials of the Cephes library. Each float32 operation is rounded on its own.
"""

import math
import zlib
from collections.abc import Sequence

import torch

NORMAL, UNIFORM, RADEMACHER = 0, 1, 2
STREAMS = {"normal": NORMAL, "rademacher": RADEMACHER}
Z_STREAM_VERSION = 1
SEED_OF_STEP = 0x6D657A6F  # "mezo": the stream word of the counter that yields the seeds of a run

Word = int | torch.Tensor
"""32 bits as an integer, or many of them in a tensor of int64."""
_MASK = 0xFFFFFFFF
_LOG = (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip


def tensor_id(name: str) -> int:
    """CRC-32 of a parameter's canonical name: the counter word that keeps parameters apart.

    >>> hex(tensor_id("w"))
    '0x1c630b12'
    """
    return zlib.crc32(name.encode())


def check_seed(seed: int) -> int:
    """Return `seed` unchanged, or raise ValueError unless it is an integer in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int in [0, 2**64), got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return seed


def halves(seeds: Sequence[int]) -> list[int]:
    """The low and the high 32 bits of each seed, one after the other: an int of torch.library has 63 bits.

    >>> halves([2**32 + 5])
    [5, 1]
    """
    return [half for seed in seeds for half in (seed & _MASK, seed >> 32)]


def philox_4x32(c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four random words of a counter of four words, under a key of two.

    Args:
        c0, c1, c2, c3: words of the counter, in [0, 2**32): integers, or int64 tensors of one shape. A product of two
            words wraps around in int64, which keeps both of its halves exact.
        k0, k1: words of the key, in [0, 2**32): integers, or int64 tensors that broadcast with the counter's.
    Returns:
        Four words, of the kind and shape of the counter's and the key's.

    >>> [hex(word) for word in philox_4x32(0, 0, 0, 0, 0, 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(seeds: Sequence[int], tensor_id: int, group: torch.Tensor, stream: int):
    """Four words of each seed and block, (len(seeds), *group.shape) each."""
    tag = torch.full_like(group, tensor_id)
    counter = (group & _MASK, (group >> 32) & _MASK, tag, torch.full_like(group, stream))
    keys = torch.tensor(halves(seeds), dtype=torch.int64, device=group.device).view(-1, 2)
    return philox_4x32(*counter, *keys.T.view(2, -1, *(1 for _ in group.shape)))


def box_muller(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two standard normals, float32, from two 32-bit words held in int64 tensors."""
    # u in (0, 1]
    u = x.to(torch.float32) * 2.0**-32 + 2.0**-33
    # log u = log(m + 1) + e log 2, by the Cephes polynomial
    b = u.view(torch.int32)
    e = (b - 0x3F3504F3) >> 23
    m = (b - (e << 23)).view(torch.float32) - 1
    p = torch.full_like(m, 7.0376836292e-2)
    for k in _LOG:
        p = p * m + k
    t = m * m
    e = e.to(torch.float32)
    log_u = (p * m) * t
    log_u = log_u + e * -2.12194440e-4
    log_u = log_u - t * 0.5
    log_u = (m + log_u) + e * 0.693359375
    # r = sqrt(-2 log u), correctly rounded: torch's float32 sqrt may come from a vector library that is an ulp off,
    # and rounding the float64 root once is exact because 53 bits exceed 2 * 24 + 2
    r = torch.sqrt((log_u * -2).to(torch.float64)).to(torch.float32)
    # angle = pi/2 q + f
    q = y >> 30
    low = (y << 2) & _MASK
    f = (low - ((low >> 31) << 32)).to(torch.float32) * 3.657295198167899e-10
    w = f * f
    s = ((w * -1.9515295891e-4 + 8.3321608736e-3) * w + -1.6666654611e-1) * (w * f) + f
    c = ((w * 2.443315711809948e-5 + -1.388731625493765e-3) * w + 4.166664568298827e-2) * (w * w) + (1 - w * 0.5)
    odd = (q & 1) == 1
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where((q == 1) | (q == 2), -cosine, cosine)
    sine = torch.where(q >= 2, -sine, sine)
    return r * cosine, r * sine


def normal_at(seeds: Sequence[int], tensor_id: int, index: torch.Tensor) -> torch.Tensor:
    """z ~ N(0, 1) of some elements of one parameter; arguments and result as in `z_at`."""
    w0, w1, w2, w3 = _words(seeds, tensor_id, index >> 2, NORMAL)
    second_pair = (index & 2) != 0
    even, odd = box_muller(torch.where(second_pair, w2, w0), torch.where(second_pair, w3, w1))
    return torch.where((index & 1) == 1, odd, even)


def rademacher_at(seeds: Sequence[int], tensor_id: int, index: torch.Tensor) -> torch.Tensor:
    """z uniform on {-1, +1}: a bit an element, 128 to a Philox block, a set bit means -1; arguments as in `z_at`."""
    word = torch.stack(_words(seeds, tensor_id, index >> 7, RADEMACHER), -1)
    word = word.gather(-1, ((index >> 5) & 3).expand(word.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return 1 - 2 * ((word >> (index & 31)) & 1).to(torch.float32)


def z_at(seeds: Sequence[int], tensor_id: int, index: torch.Tensor, distribution: str) -> torch.Tensor:
    """z of some elements of one parameter, of several seeds at once: a few large operations for many small ones.

    Args:
        seeds: each in [0, 2**64).
        tensor_id: number of the parameter, 0 <= tensor_id < 2**32; see `tensor_id`.
        index: row-major indices of the elements in the full parameter, int64, any shape.
        distribution: "normal" or "rademacher".
    Returns:
        float32 tensor (len(seeds), *index.shape).
    """
    return (normal_at if distribution == "normal" else rademacher_at)(seeds, tensor_id, index)


def lora_init(
    run_seed: int,
    name: str,
    full_shape: tuple[int, int],
    row_start: int = 0,
    rows: int | None = None,
    col_start: int = 0,
    cols: int | None = None,
) -> torch.Tensor:
    """Initial lora_A of a run, or a block of it: Kaiming uniform with a = sqrt(5), drawn from stream 1.

    Args:
        run_seed: seed of the run, 0 <= run_seed < 2**64.
        name: canonical parameter name.
        full_shape: (r, fan_in) of the unsharded lora_A.
        row_start, col_start: first row and column of the block wanted, >= 0.
        rows, cols: size of the block; None for all rows or all columns of lora_A.
    Returns:
        float32 tensor (rows, cols) on the CPU, uniform in [-b, b) with b = sqrt(6 / ((1 + 5) fan_in)).
    Raises:
        ValueError: a bad seed.

    >>> a = lora_init(0, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 576))
    >>> [f"{bits:08x}" for bits in a[0, :4].view(torch.int32).tolist()]
    ['3c67e5e0', '3cd057bb', '3be1dc00', '3cdbdeb3']
    """
    fan_in = full_shape[1]
    rows, cols = full_shape[0] if rows is None else rows, fan_in if cols is None else cols
    row, col = torch.arange(rows, device="cpu") + row_start, torch.arange(cols, device="cpu") + col_start
    index = (row * fan_in)[:, None] + col
    word = torch.stack(_words([check_seed(run_seed)], tensor_id(name), index >> 2, UNIFORM), -1)[0]
    word = word.gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)
    bound = torch.tensor(math.sqrt(6 / ((1 + 5) * fan_in)), dtype=torch.float32, device="cpu")
    return ((word >> 8).to(torch.float32) * 2.0**-23 - 1) * bound


def perturbation_seed(run_seed: int, step: int, k: int = 0) -> int:
    """Seed of perturbation k of a step: words w0 + 2**32 w1 of the Philox block (step, k) under key run_seed.

    Args:
        run_seed: seed of the run, 0 <= run_seed < 2**64.
        step: number of the step, 0 <= step < 2**64.
        k: number of the perturbation within its step, 0 <= k < 2**32.
    Returns:
        A seed in [0, 2**64).
    Raises:
        ValueError: a bad run_seed.

    >>> perturbation_seed(0, 1, 1)
    11884268794979519706
    """
    counter = (step & _MASK, step >> 32, k, SEED_OF_STEP)
    w0, w1, _, _ = philox_4x32(*counter, check_seed(run_seed) & _MASK, run_seed >> 32)
    return w0 + (w1 << 32)
