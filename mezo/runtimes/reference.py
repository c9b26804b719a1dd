"""Log-probabilities by a model's own forward pass: what every runtime is compared with."""

import torch
from torch import nn

from mezo.models.head import LINEAR_HEAD
from mezo.runtimes.rows import RowBatch, scored

REFERENCE_ROWS = 8  # of a full forward pass: the logits of every token of them are held at once


def reference_log_probs(model: nn.Module, batch: RowBatch) -> torch.Tensor:
    """log p of a batch's targets by the model's own forward pass, float64 on the CPU, (rows, scored, candidates)."""
    parts = zip(
        *(t.split(REFERENCE_ROWS) for t in (batch.ids, batch.mask, batch.positions, batch.targets)), strict=True
    )
    found = []
    for ids, mask, positions, targets in parts:
        out = model(input_ids=ids, attention_mask=mask)
        if hasattr(out, "logits"):
            logits = scored(out.logits, positions)
        else:
            logits = getattr(model.get_base_model(), LINEAR_HEAD)(scored(out.last_hidden_state, positions))
        found.append(logits.double().log_softmax(-1).gather(-1, targets).cpu())
    return torch.cat(found)
