"""An adapted lm_head under SGLang's torch-native LoRA backend, which other backends of it support by themselves.

The head is given the scored positions alone, while that backend would divide them among adapters as if it had been
given every token (0.5.23). The engine's own count of those positions is used instead.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.lora.utils import get_lm_head_pruned_lens

if TYPE_CHECKING:
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo
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

    Args:
        result: what it returned.
        backend: whose method it is.
        forward_batch: the engine's batch.
        weight_indices: slot of the adapter of each request.
        args, kwargs: its other arguments.
    """
    lengths = get_lm_head_pruned_lens(forward_batch)
    if lengths is None:
        backend.lm_head_batch_info = None
        return
    segments = torch.tensor(lengths, dtype=torch.int32)
    backend.lm_head_batch_info = dataclasses.replace(
        backend.batch_info,
        num_segments=len(lengths),
        seg_lens_cpu=segments,
        seg_indptr_cpu=torch.nn.functional.pad(segments.cumsum(0, dtype=torch.int32), (1, 0)),
        weight_indices_cpu=torch.tensor(weight_indices, dtype=torch.int32),
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
