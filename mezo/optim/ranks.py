"""Several processes that step as one: they exchange losses, never weights."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist


def world_size() -> int:
    """Processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averaged(losses: Sequence[float], settings: dict, checksum: int | None) -> list[float]:
    """Mean over ranks of each loss: the same float64 numbers on every rank.

    Args:
        losses: as many on every rank.
        settings: what must be equal on all ranks.
        checksum: of theta, where this rank has one to compare.
    Raises:
        ValueError: on every rank, where ranks differ.
    """
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, (list(losses), settings, checksum))
    for rank, (_, others, theirs) in enumerate(gathered):
        different = [name for name, value in gathered[0][1].items() if others[name] != value]
        if theirs is not None and gathered[0][2] is not None and theirs != gathered[0][2]:
            different.append("parameters")
        if different:
            raise ValueError(
                f"rank {rank} has other {' and '.join(different)} than rank 0, and losses are averaged over ranks that "
                "hold the same: broadcast the parameters and give equal options, or average_losses=False to train apart"
            )
    return [math.fsum(column) / len(gathered) for column in zip(*(own for own, _, _ in gathered), strict=True)]


def checksum_of(tensors: Sequence[torch.Tensor]) -> int:
    """Of float32 tensors: the sum of their bits as integers, which no order of summation changes."""
    return sum(tensor.view(torch.int32).sum(dtype=torch.int64).item() for tensor in tensors) % 2**64
