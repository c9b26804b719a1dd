"""An adapted lm_head in SGLang (0.5.23): which of its rows are whose, and float32 logits where weights have 16 bits.

The head is given the scored positions alone. The torch-native LoRA backend would divide them among adapters as if it
had been given every token; the engine's own count of those positions is used instead. Other backends do so themselves.

With `enable_fp32_lm_head` a plain head has float32 logits, an adapted one does not: SGLang asks first whether there is
an adapter, and its branch for adapters computes in 16 bits. Logits near 20 then come in steps of an eighth.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from sglang.srt.environ import envs
from sglang.srt.lora.utils import get_lm_head_pruned_lens

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo
    from sglang.srt.lora.layers import ParallelLMHeadWithLoRA
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def prune(
    result: None,
    backend: "TorchNativeLoRABackend",
    forward_batch: "ForwardBatch",
    weight_indices: list[int],
    *args,
    **kwargs,
) -> None:
    """After `prepare_lora_batch`: say which of the head's inputs belong to which adapter, a segment a request.

    Where there are so many that SGLang gives them to the head in several passes, the same of each pass.

    Args:
        result: what it returned.
        backend: whose method it is.
        forward_batch: the engine's batch.
        weight_indices: slot of the adapter of each request.
        args, kwargs: its other arguments.
    """
    lengths = get_lm_head_pruned_lens(forward_batch)
    passes = None if lengths is None else backend._get_lm_head_pass_segments(weight_indices, lengths)
    backend.lm_head_batch_info = None if lengths is None else _divided(backend, weight_indices, lengths)
    backend.lm_head_pass_batch_infos = passes and [_divided(backend, *one) for one in passes]


def _divided(backend: "TorchNativeLoRABackend", slots: list[int], lengths: list[int]) -> "TorchNativeLoRABatchInfo":
    """The batch with these segments: slot of the adapter, and rows, of each."""
    segments = torch.tensor(lengths, dtype=torch.int32)
    return dataclasses.replace(
        backend.batch_info,
        num_segments=len(lengths),
        seg_lens_cpu=segments,
        seg_indptr_cpu=torch.nn.functional.pad(segments.cumsum(0, dtype=torch.int32), (1, 0)),
        weight_indices_cpu=torch.tensor(slots, dtype=torch.int32),
        max_len=max(lengths),
        expected_tokens=sum(lengths),
    )


def use_pruned(
    original: Callable,
    backend: "TorchNativeLoRABackend",
    *args,
    pruned_batch_info: "TorchNativeLoRABatchInfo | None" = None,
    **kwargs,
) -> torch.Tensor:
    """Around `run_lora_a_sgemm` and `run_lora_b_sgemm`: take the inputs as `prune` divided them, if it is the head.

    Args:
        original: the method.
        backend: whose method it is.
        args, kwargs: its arguments.
        pruned_batch_info: what `prune` left; None of other modules than the head.
    """
    whole = backend.batch_info
    backend.batch_info = pruned_batch_info or whole
    try:
        return original(backend, *args, **kwargs)
    finally:
        backend.batch_info = whole


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What the head needs to know of one adapter.

    Args:
        slot: its place in the engine's pool.
        rank: rows of its A.
        scaling: its product's factor.
    """

    slot: int
    rank: int
    scaling: float


def divide(result: None, manager: "LoRAManager", forward_batch: "ForwardBatch", *args, **kwargs) -> None:
    """After `LoRAManager.prepare_lora_batch`: remember the adapter of each row that the head will be given.

    Nothing where a CUDA graph has the head in it, which runs no Python: such graphs decode text, where logits of 16
    bits will do.

    Args:
        result: what it returned.
        manager: whose method it is.
        forward_batch: the engine's batch.
        args, kwargs: its other arguments.
    """
    backend = manager.lora_backend
    backend.mezo_rows = None
    info = backend.batch_info
    if info is None or (info.use_cuda_graph and not forward_batch.forward_mode.is_extend()):
        return
    adapters = [_adapter(manager, uid) for uid in forward_batch.lora_ids]
    lengths = get_lm_head_pruned_lens(forward_batch) or [1] * len(adapters)
    backend.mezo_rows = [one for one, length in zip(adapters, lengths, strict=True) for _ in range(length)]


def _adapter(manager: "LoRAManager", uid: str | None) -> Adapter | None:
    """The adapter of an id that the pool holds; None of the base."""
    if uid is None:
        return None
    lora = manager.loras[uid]
    return Adapter(manager.memory_pool.get_buffer_id(uid), lora.config.r, lora.scaling)


def in_float32(
    original: Callable,
    processor: "LogitsProcessor",
    hidden_states: torch.Tensor,
    lm_head: torch.nn.Module,
    *args,
    **kwargs,
) -> torch.Tensor:
    """Around `LogitsProcessor._compute_lm_head`: logits of an adapted 16-bit head in float32, where it was asked for.

    Args:
        original: the method, which does this for a plain head.
        processor: whose method it is.
        hidden_states: the head's input, (rows, hidden size).
        lm_head: the head.
        args, kwargs: its other arguments.
    Returns:
        (rows, size of this rank's part of the vocabulary).
    """
    rows = getattr(getattr(lm_head, "lora_backend", None), "mezo_rows", None)
    wanted = processor.use_fp32_lm_head and hidden_states.dtype != torch.float32
    if rows is None or not wanted or not lm_head.lora_active:
        return original(processor, hidden_states, lm_head, *args, **kwargs)
    logits = original(processor, hidden_states, lm_head.base_layer).float()
    bias = getattr(lm_head.base_layer, "bias", None)
    if bias is not None:
        logits += bias
    for adapter, part in _parts(lm_head, rows, len(hidden_states)):
        logits[part, : lm_head.lora_offsets[-1]] += _product(lm_head, adapter, hidden_states[part])
    return logits


def _parts(
    lm_head: "ParallelLMHeadWithLoRA", rows: list[Adapter | None], count: int
) -> Iterator[tuple[Adapter, slice]]:
    """Runs of the head's input that have one adapter. SGLang may divide the input into passes of one size."""
    number = lm_head.lora_backend._lm_head_pass_idx
    if number is not None:
        begin = number * envs.SGLANG_LOGPROB_CHUNK_SIZE.get()
        rows = rows[begin : begin + count]
    if len(rows) != count:
        raise RuntimeError(f"the head was given {count} rows, the adapters of {len(rows)} are known")
    begin = 0
    for adapter, run in itertools.groupby(rows):
        part = slice(begin, begin + len(list(run)))
        begin = part.stop
        if adapter is not None:
            yield adapter, part


def _product(lm_head: "ParallelLMHeadWithLoRA", adapter: Adapter, hidden_states: torch.Tensor) -> torch.Tensor:
    """scaling x A^T B^T in float32, of this rank's part of the vocabulary."""
    a = lm_head.lm_head_A_buffer[adapter.slot, : adapter.rank].float()
    b = lm_head.lm_head_B_buffer[adapter.slot, : lm_head.lora_offsets[-1], : adapter.rank].float()
    return adapter.scaling * (hidden_states.float() @ a.T) @ b.T
