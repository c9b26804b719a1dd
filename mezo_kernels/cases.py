"""Arguments that show every op at work, for whatever checks ops: storage of every kind, every dtype, values of a run.

Whatever an op must write is NaN at first, so that an element it leaves out is seen.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from mezo_kernels.layout import DTYPES, ParamLayout, ParamSlot
from mezo_kernels.philox import STREAMS, halves, tensor_id
from mezo_kernels.rules import KINDS, Rule

SEED = 2**63 + 5
UPDATES = [(3, 0.1, 0.9), (2**64 - 1, -0.2, 0.99), (4, 0.0, 1.0), (5, 1e-30, 1.0)]
"""(seed, coefficient, decay): decays, a seed of 64 bits, a coefficient of zero and one that hardly counts."""
RULES = [Rule("momentum"), Rule("adam", 0.9, 0.99, 1e-6, l2=0.1), Rule("adamw", 0.8), Rule("sign")]
MIXES = (*((dtype,) for dtype in DTYPES), DTYPES)
"""Dtypes of a layout's parameters: one for all, or each in turn."""
STARTS = (0, 1, 2**31 - 2, 2**34 + 3)
"""First elements that begin a block of the counter, lie inside one, and lie beyond 32 bits."""


def layout(device: str, *dtypes: torch.dtype, written: bool = True, aligned: bool = False) -> ParamLayout:
    """Storage of every kind: contiguous, sharded by rows and by columns, strided, transposed, far into a parameter.

    Args:
        device: where the storage is.
        dtypes: of the parameters in turn: float32, bfloat16 or float16.
        written: whether it holds numbers; otherwise all of it is NaN.
        aligned: contiguous and aligned parameters alone, for which a backend may have code of their own.
    Returns:
        The same parameters and strides at every call, in new storage.
    Raises:
        ValueError: another dtype.
    """
    in_turn = itertools.cycle(dtypes)

    def values(*shape: int) -> torch.Tensor:
        dtype = next(in_turn)
        if not written:
            return torch.full(shape, torch.nan, dtype=dtype, device=device)
        # exact in every dtype, and the same on every machine
        count = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
        return (((count * 37) % 256 - 128) / 64).view(shape).to(dtype).to(device)

    if aligned:
        # a GPU's tile has 2048 elements
        return ParamLayout({"whole_tiles": values(4096), "one_unit_more": values(257, 8), "part_of_one": values(408)})
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
            ParamSlot("rows_apart", values(20, 27)[:, :24]),
            ParamSlot("unaligned_address", values(2051)[1:]),
            ParamSlot("columns_apart", values(12, 16)[:, ::2]),
            ParamSlot("rows_end_inside_blocks", values(12, 24)[:, :22], (12, 64)),
            ParamSlot("rows_begin_inside_blocks", values(8, 16), (8, 62), 0, 4),
            ParamSlot("shard_inside_a_block", values(1024), (9000,), 5),
        ]
    )


def _name(dtypes: Sequence[torch.dtype]) -> str:
    return str(dtypes[0]).removeprefix("torch.") if len(dtypes) == 1 else "mixed"


def _tensors(layouts: Sequence[ParamLayout]) -> list[torch.Tensor]:
    return [tensor for one in layouts for tensor in one.tensors]


def of_perturb(device: str) -> Iterator[tuple[str, tuple]]:
    """theta of every dtype, along z of every distribution."""
    for dtypes, distribution, aligned in itertools.product(MIXES, STREAMS, (False, True)):
        theta = layout(device, *dtypes, aligned=aligned)
        label = f"{_name(dtypes)} {distribution}{aligned * ' aligned'}"
        yield label, (theta.tensors, [theta.geometry], 0.013, *halves([SEED]), distribution)


def of_step(device: str) -> Iterator[tuple[str, tuple]]:
    """Several updates of a float32 master, then plus and minus of every dtype, of two perturbations; updates alone."""
    seeds, coefficients, decays = zip(*UPDATES, strict=True)
    for dtypes, (aligned, copies) in itertools.product(MIXES, ((False, 2), (True, 2), (True, 0))):
        theta = layout(device, *((torch.float32,) if copies else dtypes), aligned=aligned)
        plus, minus = ([layout(device, *dtypes, written=False, aligned=aligned) for _ in range(copies)] for _ in "+-")
        yield (
            f"{_name(dtypes)}{aligned * ' aligned'}{(not copies) * ' updates alone'}",
            (
                theta.tensors,
                _tensors(plus),
                _tensors(minus),
                [one.geometry for one in (theta, *plus, *minus)],
                halves([*seeds]),
                list(coefficients),
                list(decays),
                halves([2**63, 9][:copies]),
                1e-3,
                "normal",
            ),
        )


def of_rule_step(device: str) -> Iterator[tuple[str, tuple]]:
    """Two steps by every rule, of one and of two perturbations, then one or two plus and minus; dtypes take turns."""
    numbers = [(-0.5, 1.0, 0.01, 0.999, 1.25), (0.3, 0.0, 0.02, 1.0, 1.5), (-2.0, 1.0, 0.02, 1.0, 1.5)]
    for i, (rule, aligned) in enumerate(itertools.product(RULES, (False, True))):
        dtypes, copies = MIXES[(i + i // 2) % len(MIXES)], 1 + aligned
        theta, *state = (layout(device, torch.float32, aligned=aligned) for _ in range(1 + rule.states))
        torch._foreach_abs_(_tensors(state) or _tensors([theta]))  # a second moment is not negative
        plus, minus = ([layout(device, *dtypes, written=False, aligned=aligned) for _ in range(copies)] for _ in "+-")
        yield (
            f"{rule.kind} {_name(dtypes)}{aligned * ' aligned'}",
            (
                theta.tensors,
                _tensors(state),
                _tensors(plus),
                _tensors(minus),
                [one.geometry for one in (theta, *state, *plus, *minus)],
                KINDS[rule.kind],
                rule.constants,
                halves([2**64 - 1, 5, 6]),
                [number for row in numbers for number in row],
                halves([7, 2**63][:copies]),
                1e-2,
                ("normal", "rademacher")[i // 4],
            ),
        )


def of_standard_normal(device: str) -> Iterator[tuple[str, tuple]]:
    """z of every distribution from every kind of first element."""
    for distribution in STREAMS:
        for start in STARTS:
            label = f"{distribution} from {start}"
            yield label, (*halves([SEED]), tensor_id("w"), start, 3001, distribution, torch.device(device))
