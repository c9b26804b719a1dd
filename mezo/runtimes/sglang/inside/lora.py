"""Products of adapters in an engine on a CPU: what SGLang (0.5.23) loops over a segment at a time.

A segment is a run of rows that have one adapter. SGLang's loop over segments reads its numbers out of tensors, which
takes several times as long as a small product. Here a forward pass works them out once, for all its layers, and a
module divides its tensors among segments in one call. Segments of one length that follow one another, and whose
adapters lie in that order in the engine's memory, are one batched product without copies: those of all directions where
text is decoded.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABatchInfo

FEWEST = 3  # segments that are worth a batched product


@dataclass(frozen=True)
class Run:
    """Segments that are one product: of one length, of adapters that lie one after the other.

    Args:
        segments: how many.
        length: rows of each.
        slot: of the first one's adapter.
        rank: of the adapters; 0 where rows have none.
        scaling: of the adapters.
    """

    segments: int
    length: int
    slot: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class Plan:
    """What a forward pass multiplies adapters by: runs, in the order in which the rows of a batch lie."""

    runs: Sequence[Run]

    def products(
        self, rank: int, output: torch.Tensor, inputs: torch.Tensor, factors: torch.Tensor
    ) -> Iterator[tuple[Run, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each run of a rank, its rows of output and inputs, and its factor; of several segments a batch of each.

        Args:
            rank: of the adapters.
            output: (rows, outputs), of the whole batch.
            inputs: (rows, inputs).
            factors: (slots, inputs, outputs).
        """
        singles = factors.unbind() if self.ranks[rank] else ()
        for run, into, x in zip(self.runs, output.split(self.rows), inputs.split(self.rows), strict=True):
            if run.rank != rank:
                continue
            if run.segments == 1:
                yield run, into, x, singles[run.slot]
            else:
                shape = (run.segments, run.length)
                yield run, into.unflatten(0, shape), x.unflatten(0, shape), factors[run.slot : run.slot + run.segments]

    @functools.cached_property
    def rows(self) -> list[int]:
        """Of each run."""
        return [run.segments * run.length for run in self.runs]

    @functools.cached_property
    def ranks(self) -> dict[int, bool]:
        """Those of its adapters, and whether a segment of that rank is alone."""
        ranks = {run.rank for run in self.runs if run.rank}
        return {rank: any(run.rank == rank and run.segments == 1 for run in self.runs) for rank in ranks}


def plan_of(info: "TorchNativeLoRABatchInfo") -> Plan:
    """The plan of a batch, which all layers share."""
    kept = info.__dict__.get("mezo_plan")
    if kept is None:
        kept = info.__dict__["mezo_plan"] = Plan(joined(segments_of(info)))
    return kept


def segments_of(info: "TorchNativeLoRABatchInfo") -> list[Run]:
    """The segments of a batch, each alone; the base's too."""
    slots, lengths = info.weight_indices_cpu.tolist(), info.seg_lens_cpu.tolist()
    ranks, scalings = info.lora_ranks_cpu.tolist(), info.scalings_cpu.tolist()
    return [Run(1, n, slot, ranks[slot], scalings[slot]) for slot, n in zip(slots, lengths, strict=False) if n]


def joined(segments: Sequence[Run]) -> list[Run]:
    """Those that are worth it as one."""
    runs: list[Run] = []
    alike = lambda at: (at[1].slot - at[0], at[1].length, at[1].rank, at[1].scaling)  # noqa: E731
    for _, members in itertools.groupby(enumerate(segments), alike):
        some = [each for _, each in members]
        together = some[0].rank and len(some) >= FEWEST
        runs += [dataclasses.replace(some[0], segments=len(some))] if together else some
    return runs


def shrink(
    original: Callable, inputs: torch.Tensor, weights: torch.Tensor, batch_info: object, num_slices: int = 1
) -> torch.Tensor:
    """Around `sgemm_lora_a_fwd`: scaling x A^T of every segment, zero where there is no adapter.

    Args:
        original: the function.
        inputs: (rows, columns).
        weights: (slots, slices x largest rank, columns).
        batch_info: whose rows they are.
        num_slices: products of the same x that are one, as those of q, k and v.
    Returns:
        (rows, slices x largest rank).
    """
    if batch_info.use_cuda_graph or weights.numel() == 0:
        return original(inputs, weights, batch_info, num_slices)
    plan, output = plan_of(batch_info), inputs.new_zeros(len(inputs), weights.shape[1])
    for rank in plan.ranks:
        width = num_slices * rank
        for run, into, x, factor in plan.products(rank, output[:, :width], inputs, weights[:, :width].mT):
            add = into.addmm_ if into.dim() == 2 else into.baddbmm_
            add(x, factor, beta=0, alpha=run.scaling)
    return output


def expand(
    original: Callable,
    inputs: torch.Tensor,
    weights: torch.Tensor,
    batch_info: object,
    slice_offsets: torch.Tensor,
    base_output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Around `sgemm_lora_b_fwd`: add x B^T of every segment to the base's output.

    Args:
        original: the function.
        inputs: (rows, slices x largest rank), as `shrink` returns them.
        weights: (slots, outputs of all slices, largest rank).
        batch_info: whose rows they are.
        slice_offsets: where the outputs of each slice begin, and where the last ones end.
        base_output: (rows, outputs), which is written; None stands for zeros.
    """
    if batch_info.use_cuda_graph or weights.numel() == 0:
        return original(inputs, weights, batch_info, slice_offsets, base_output)
    plan, ends = plan_of(batch_info), slice_offsets.tolist()
    output = inputs.new_zeros(len(inputs), ends[-1]) if base_output is None else base_output
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        for rank in plan.ranks:
            shrunk, factors = inputs[:, number * rank : (number + 1) * rank], weights[:, begin:end, :rank].mT
            for _, into, x, factor in plan.products(rank, output[:, begin:end], shrunk, factors):
                add = into.addmm_ if into.dim() == 2 else into.baddbmm_
                add(x, factor)
    return output
