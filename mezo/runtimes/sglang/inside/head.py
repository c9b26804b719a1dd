"""An adapted lm_head under SGLang's torch-native LoRA backend, which other backends of it support by themselves.

The head is given the scored positions alone, while that backend would divide its rows among adapters as if it had
been given every token (0.5.23). The engine's own count of those positions is used instead.
"""

import dataclasses

import torch
from sglang.srt.lora.utils import get_lm_head_pruned_lens


def prune(result, backend, forward_batch, weight_indices, *args, **kwargs) -> None:
    """After `prepare_lora_batch`: say which rows of the head belong to which adapter, a segment a request."""
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


def use_pruned(original, backend, *args, pruned_batch_info=None, **kwargs) -> torch.Tensor:
    """Around `run_lora_a_sgemm` and `run_lora_b_sgemm`: take the rows as `prune` divided them, if it is the head."""
    whole = backend.batch_info
    backend.batch_info = pruned_batch_info or whole
    try:
        return original(backend, *args, **kwargs)
    finally:
        backend.batch_info = whole
