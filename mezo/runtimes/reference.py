"""What every runtime is compared with at its start: log-probabilities by the model's own forward pass."""

import torch
from torch import nn

from mezo.models.spec import LINEAR_HEAD
from mezo.runtimes.rows import RowBatch, scored

EXAMPLES = 3  # that a proof scores besides the longest
TOLERANCE = 1e-4  # on log-probabilities in float32; shapes differ, so sums are ordered differently
REFERENCE_ROWS = 8  # of a full forward pass: the logits of every token of them are held at once


def reference_log_probs(model: nn.Module, batch: RowBatch) -> torch.Tensor:
    """log p of a batch's targets by the model's own forward pass, float64 on the CPU, (rows, scored, candidates)."""
    tensors = [batch.ids, batch.mask, batch.positions, batch.targets]
    tensors += [] if batch.decoder is None else [batch.decoder]
    log_probs = []
    for ids, mask, positions, targets, *decoder in zip(*(t.split(REFERENCE_ROWS) for t in tensors), strict=True):
        more = {"decoder_input_ids": decoder[0]} if decoder else {}
        out = model(input_ids=ids, attention_mask=mask, **more)
        if hasattr(out, "logits"):
            logits = scored(out.logits, positions)
        else:
            logits = getattr(model.get_base_model(), LINEAR_HEAD)(scored(out.last_hidden_state, positions))
        log_probs.append(logits.double().log_softmax(-1).gather(-1, targets).cpu())
    return torch.cat(log_probs)


def largest_difference(a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor) -> float:
    """max |a - b| at the positions that are compared.

    Args:
        a, b: (rows, scored, candidates), on the CPU.
        valid: (rows, scored) bool, which positions.

    >>> a, b = torch.tensor([[[1.0], [9.0]]]), torch.tensor([[[1.5], [0.0]]])
    >>> largest_difference(a, b, torch.tensor([[True, False]]))
    0.5
    """
    return float((a - b).abs().masked_fill(~valid[:, :, None].cpu(), 0).max())
