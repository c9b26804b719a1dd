"""Where a canonical LoRA parameter lies in SGLang's adapter pool, read off the engine's own slicing of weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mezo.models.families import HEAD, family_of, module_of

if TYPE_CHECKING:
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import LoRAMemoryPool


@dataclass(frozen=True)
class Shard:
    """The block of a parameter that this rank holds, and its place in the pool's buffers.

    Args:
        module: name of the engine's module.
        leaf, layer, factor: key of the pool's buffer; factor is "A" or "B", and the head is in no layer.
        rows, cols: (start, end) in a slot of that buffer.
        full_shape: of the unsharded parameter.
        row_start, col_start: position of the block in it.
    """

    module: str
    leaf: str
    layer: int | None
    factor: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    full_shape: tuple[int, int]
    row_start: int
    col_start: int

    def view(self, pool: "LoRAMemoryPool", slot: int) -> torch.Tensor:
        """The block's storage in a slot."""
        kind = "" if self.layer is not None else "lm_head_"
        buffer = getattr(pool, f"{kind}{self.factor}_buffer")[self.leaf]
        slots = buffer if self.layer is None else buffer[self.layer]
        return slots[slot][slice(*self.rows), slice(*self.cols)]

    def block(self, full: torch.Tensor) -> torch.Tensor:
        """The block of a full tensor."""
        rows, cols = (end - start for start, end in (self.rows, self.cols))
        return full[self.row_start : self.row_start + rows, self.col_start : self.col_start + cols]


@dataclass(frozen=True)
class Whole:
    """A parameter that every rank holds whole and that lies in no buffer of the engine's: the R of LoRA-XS.

    Args:
        full_shape: of the parameter.
        row_start, col_start: position of the block in it, as a `Shard` has them.
    """

    full_shape: tuple[int, int]
    row_start: int = 0
    col_start: int = 0

    def block(self, full: torch.Tensor) -> torch.Tensor:
        """The block of a full tensor: all of it."""
        return full


def shard_of(manager: "LoRAManager", name: str, full_shape: tuple[int, int]) -> Shard:
    """Locate a parameter in the pool of a `LoRAManager`.

    The engine's slicing methods are applied to row and column numbers in place of weights: what comes out says which
    rows and columns of the full parameter this rank holds, whatever the kind of the module and its sharding.

    Args:
        manager: the engine's LoRA manager.
        name: canonical name, of a `lora_A.weight` or `lora_B.weight`.
        full_shape: of the unsharded parameter.
    Raises:
        ValueError: the engine has no such module, or holds it in a form that is not a block of rows or columns.
    """
    family = family_of(manager.base_hf_config)
    layer, (parent, _, leaf) = family.layer_of(name), module_of(name).rpartition(".")
    stacked, position = family.stack_of(leaf)
    module = f"{parent}.{stacked}".removeprefix(".")
    modules = {HEAD: manager.lm_head_module} if layer is None else manager.lora_modules[layer]
    adapted = modules.get(module)
    if adapted is None:
        known = sorted({n.rsplit(".", 1)[-1] for n in modules})
        raise ValueError(f"the engine has no LoRA module {module}; layer {layer} has {', '.join(known)}")
    place = {"module": module, "leaf": stacked, "layer": layer, "full_shape": full_shape}
    if name.endswith("lora_A.weight"):
        r, fan_in = full_shape
        start, end = _run(adapted.slice_lora_a_weights(torch.arange(fan_in)[None].clone())[0], name)
        rows, cols = (position * r, (position + 1) * r), (0, end - start)
        shard = Shard(**place, factor="A", rows=rows, cols=cols, row_start=0, col_start=start)
    else:
        sizes = _member_sizes(adapted.base_layer, full_shape[0])
        first = sum(sizes[:position])
        if len(sizes) <= position or sizes[position] != full_shape[0]:
            raise ValueError(f"{name} has {full_shape[0]} rows, the engine's {stacked} has members of {sizes}")
        ids = adapted.slice_lora_b_weights(torch.arange(sum(sizes))[:, None].clone())[:, 0]
        mine = ((ids >= first) & (ids < first + sizes[position])).nonzero().flatten()
        low, high = _run(mine, name)
        start, _ = _run(ids[mine] - first, name)
        shard = Shard(
            **place, factor="B", rows=(low, high), cols=(0, full_shape[1]), row_start=start, col_start=0
        )  # fmt: skip
    _check_view(shard, manager.memory_pool, name)
    return shard


def _member_sizes(base: nn.Module, outputs: int) -> list[int]:
    """Full output sizes of what a module stacks; QKV counts each key and value head once, however often it is held."""
    if hasattr(base, "total_num_kv_heads"):
        kv = base.total_num_kv_heads * base.head_size
        return [base.total_num_heads * base.head_size, kv, kv]
    return list(getattr(base, "output_sizes", [outputs]))


def _run(numbers: torch.Tensor, name: str) -> tuple[int, int]:
    """(first, last + 1) of consecutive numbers."""
    start, n = int(numbers[0]), len(numbers)
    if not torch.equal(numbers, torch.arange(start, start + n)):
        raise ValueError(f"{name}: the engine does not hold a block of consecutive rows or columns")
    return start, start + n


def _check_view(shard: Shard, pool: "LoRAMemoryPool", name: str) -> None:
    view = tuple(shard.view(pool, 0).shape)
    wanted = tuple(end - start for start, end in (shard.rows, shard.cols))
    inside = shard.row_start + wanted[0] <= shard.full_shape[0] and shard.col_start + wanted[1] <= shard.full_shape[1]
    if view != wanted or not inside:
        raise ValueError(f"{name}: the engine's buffer holds {view}, its shard is {wanted} of {shard.full_shape}")
