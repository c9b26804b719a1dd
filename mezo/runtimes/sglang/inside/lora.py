"""Products of adapters in an engine on a CPU: many adapters in one call, where SGLang (0.5.23) has one call for each.

A segment is a run of rows that have one adapter. SGLang's loop over segments reads its numbers out of tensors, which
takes several times as long as a small product. Here a forward pass works them out once, for all its layers. Segments of
one length whose adapters lie beside each other in the engine's memory, as those of all directions do when text is
decoded, are one batched product.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABatchInfo

FEWEST = 3  # segments that are worth a batched product


@dataclass(frozen=True)
class Segment:
    """A run of rows with one adapter.

    Args:
        start, stop: its rows.
        slot: of the adapter.
        rank: of the adapter, > 0.
        scaling: of the adapter.
    """

    start: int
    stop: int
    slot: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class Group:
    """Segments of one length and rank, each of another adapter.

    Args:
        slots: those from the first to the last of their adapters; what lies between without a segment has zeros.
        places: (segments,) of each adapter among the slots.
        rows: (segments, length) rows of each segment.
        rank: of the adapters.
        scaling: (slots, 1, 1) float32.
    """

    slots: slice
    places: torch.Tensor
    rows: torch.Tensor
    rank: int
    scaling: torch.Tensor

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x by slot, (slots, length, columns)."""
        if len(self.places) == self.slots.stop - self.slots.start:
            return x[self.rows]
        out = x.new_zeros(self.slots.stop - self.slots.start, self.rows.shape[1], x.shape[1])
        out[self.places] = x[self.rows]
        return out

    def of_segments(self, by_slot: torch.Tensor) -> torch.Tensor:
        """The inverse: (segments length, columns), as `rows` lie."""
        whole = len(self.places) == len(by_slot)
        return (by_slot if whole else by_slot[self.places]).flatten(0, 1)


@dataclass(frozen=True)
class Plan:
    """What a forward pass multiplies adapters by: batched groups, and segments one by one."""

    groups: Sequence[Group]
    alone: Sequence[Segment]


def plan_of(info: "TorchNativeLoRABatchInfo") -> Plan:
    """The plan of a batch, which all layers share."""
    kept = info.__dict__.get("mezo_plan")
    if kept is None:
        kept = info.__dict__["mezo_plan"] = planned(segments_of(info))
    return kept


def segments_of(info: "TorchNativeLoRABatchInfo") -> list[Segment]:
    """The segments of a batch that have an adapter."""
    slots, lengths = info.weight_indices_cpu.tolist(), info.seg_lens_cpu.tolist()
    ranks, scalings = info.lora_ranks_cpu.tolist(), info.scalings_cpu.tolist()
    starts = itertools.accumulate(lengths, initial=0)
    return [
        Segment(start, start + length, slot, ranks[slot], scalings[slot])
        for slot, length, start in zip(slots, lengths, starts, strict=False)
        if length and ranks[slot]
    ]


def planned(segments: Sequence[Segment]) -> Plan:
    """Divide segments into those that are multiplied together and those that are not."""
    alike: defaultdict[tuple, list[Segment]] = defaultdict(list)
    seen: defaultdict[tuple, int] = defaultdict(int)
    for each in segments:
        key = (each.stop - each.start, each.rank)
        alike[*key, seen[*key, each.slot]].append(each)  # an adapter has one segment of a group
        seen[*key, each.slot] += 1
    groups, alone = [], []
    for some in alike.values():
        some = sorted(some, key=lambda each: each.slot)
        first, span = some[0].slot, some[-1].slot + 1 - some[0].slot
        if len(some) < FEWEST or span > 2 * len(some):
            alone += some
            continue
        places, scaling = torch.tensor([each.slot - first for each in some]), torch.zeros(span, 1, 1)
        scaling[places] = torch.tensor([each.scaling for each in some])[:, None, None]
        rows = torch.tensor([list(range(each.start, each.stop)) for each in some])
        groups.append(Group(slice(first, first + span), places, rows, some[0].rank, scaling))
    return Plan(groups, alone)


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
    for group in plan.groups:
        factor = weights[group.slots, : num_slices * group.rank]
        product = torch.bmm(group.gathered(inputs), factor.transpose(1, 2)).mul_(group.scaling)
        output[group.rows.flatten(), : num_slices * group.rank] = group.of_segments(product)
    for each in plan.alone:
        width, rows = num_slices * each.rank, slice(each.start, each.stop)
        factor = weights[each.slot, :width]
        output[rows, :width].addmm_(inputs[rows], factor.T, beta=0, alpha=each.scaling)
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
        for group in plan.groups:
            columns = slice(number * group.rank, (number + 1) * group.rank)
            factor = weights[group.slots, begin:end, : group.rank]
            product = torch.bmm(group.gathered(inputs[:, columns]), factor.transpose(1, 2))
            output[:, begin:end].index_add_(0, group.rows.flatten(), group.of_segments(product))
        for each in plan.alone:
            rows, columns = slice(each.start, each.stop), slice(number * each.rank, (number + 1) * each.rank)
            output[rows, begin:end].addmm_(inputs[rows, columns], weights[each.slot, begin:end, : each.rank].T)
    return output
