"""Arguments that show every op at work, for whatever checks ops: storage of every kind, every dtype, values of a run.

Whatever an op must write is NaN at first, so that an element it leaves out is seen.
"""

import math
from collections.abc import Iterator

import torch

from mezo_kernels.layout import DTYPES, ParamLayout, ParamSlot
from mezo_kernels.philox import STREAMS, halves, tensor_id
from mezo_kernels.rules import KINDS, Rule

SEED = 2**63 + 5
UPDATES = [(3, 0.1, 0.9), (2**64 - 1, -0.2, 0.99), (4, 0.0, 1.0), (5, 1e-30, 1.0)]
"""(seed, coefficient, decay): decays, a seed of 64 bits, a coefficient of zero and one that hardly counts."""
RULES = [Rule("momentum"), Rule("adam", 0.9, 0.99, 1e-6, l2=0.1), Rule("adamw", 0.8), Rule("sign")]
STARTS = (0, 1, 2**31 - 2, 2**34 + 3)
"""First elements that begin a block of the counter, lie inside one, and lie beyond 32 bits."""


def layout(device: str, dtype: torch.dtype, written: bool = True) -> ParamLayout:
    """Storage of every kind: contiguous, sharded by rows and by columns, strided, transposed, far into a parameter.

    Args:
        device: where the storage is.
        dtype: float32, bfloat16 or float16.
        written: whether it holds numbers; otherwise all of it is NaN.
    Returns:
        The same parameters and strides at every call, in new storage.
    Raises:
        ValueError: another dtype.
    """

    def values(*shape: int) -> torch.Tensor:
        if not written:
            return torch.full(shape, torch.nan, dtype=dtype, device=device)
        # exact in every dtype, and the same on every machine
        count = torch.arange(math.prod(shape), dtype=torch.float32)
        return (((count * 37) % 256 - 128) / 64).view(shape).to(dtype).to(device)

    return ParamLayout(
        [
            ParamSlot("contiguous", values(4096)),
            ParamSlot("odd", values(3, 343)),
            ParamSlot("row_shard", values(13, 24), (64, 24), 20),
            ParamSlot("column_shard", values(16, 40), (16, 96), 0, 8),
            ParamSlot("column_shard_across_blocks", values(9, 5), (9, 31), 0, 13),
            ParamSlot("padded_rows", values(20, 32)[:, :24]),
            ParamSlot("transposed", values(24, 20).t()),
            ParamSlot("beyond_int32", values(2, 9), (2**20, 2**34), 2**19, 2**33 + 2),
        ]
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_perturb(device: str) -> Iterator[tuple[str, tuple]]:
    """theta of every dtype, along z of every distribution."""
    for dtype in DTYPES:
        for distribution in STREAMS:
            theta = layout(device, dtype)
            label = f"{_name(dtype)} {distribution}"
            yield label, (theta.tensors, [theta.geometry], 0.013, *halves([SEED]), distribution)


def of_step(device: str) -> Iterator[tuple[str, tuple]]:
    """Several updates of a float32 master, then plus and minus of every dtype, of two perturbations."""
    seeds, coefficients, decays = zip(*UPDATES, strict=True)
    for dtype in DTYPES:
        theta = layout(device, torch.float32)
        (plus, more), (minus, less) = ([layout(device, dtype, written=False) for _ in range(2)] for _ in "+-")
        yield (
            _name(dtype),
            (
                theta.tensors,
                [*plus.tensors, *more.tensors],
                [*minus.tensors, *less.tensors],
                [one.geometry for one in (theta, plus, more, minus, less)],
                halves([*seeds]),
                list(coefficients),
                list(decays),
                halves([2**63, 9]),
                1e-3,
                "normal",
            ),
        )


def of_rule_step(device: str) -> Iterator[tuple[str, tuple]]:
    """Two steps by every rule, of one and of two perturbations, then plus and minus; the dtypes take turns."""
    numbers = [(-0.5, 1.0, 0.01, 0.999, 1.25), (0.3, 0.0, 0.02, 1.0, 1.5), (-2.0, 1.0, 0.02, 1.0, 1.5)]
    for i, rule in enumerate(RULES):
        dtype = DTYPES[i % len(DTYPES)]
        theta = layout(device, torch.float32)
        state = [layout(device, torch.float32) for _ in range(rule.states)]
        for one in state:
            torch._foreach_abs_(one.tensors)  # a second moment is not negative
        plus, minus = (layout(device, dtype, written=False) for _ in "+-")
        yield (
            f"{rule.kind} {_name(dtype)}",
            (
                theta.tensors,
                [t for one in state for t in one.tensors],
                plus.tensors,
                minus.tensors,
                [one.geometry for one in (theta, *state, plus, minus)],
                KINDS[rule.kind],
                rule.constants,
                halves([2**64 - 1, 5, 6]),
                [number for row in numbers for number in row],
                halves([7]),
                1e-2,
                ("normal", "rademacher")[i // 2],
            ),
        )


def of_standard_normal(device: str) -> Iterator[tuple[str, tuple]]:
    """z of every distribution from every kind of first element."""
    for distribution in STREAMS:
        for start in STARTS:
            label = f"{distribution} from {start}"
            yield label, (*halves([SEED]), tensor_id("w"), start, 3001, distribution, torch.device(device))
