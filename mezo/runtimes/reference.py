"""What every runtime is compared with at its start: log-probabilities by the model's own forward pass."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from mezo.errors import UserError
from mezo.models.linear import as_loaded
from mezo.models.spec import LINEAR_HEAD
from mezo.runtimes.rows import RowBatch, scored

EXAMPLES = 3  # that a proof scores besides the longest
TOLERANCE = 1e-4  # on log-probabilities in float32; shapes differ, so sums are ordered differently
REFERENCE_ROWS = 8  # of a full forward pass: the logits of every token of them are held at once


def reference_log_probs(model: nn.Module, batch: RowBatch) -> torch.Tensor:
    """log p of a batch's targets by the model's own forward pass, float64 on the CPU, (rows, scored, candidates).

    Products are torch's own, whatever the runtime uses.
    """
    with as_loaded():
        return model_log_probs(model, batch)


def model_log_probs(model: nn.Module, batch: RowBatch) -> torch.Tensor:
    """As `reference_log_probs`, by the runtime's products."""
    tensors = [batch.ids, batch.mask, batch.positions, batch.targets]
    tensors += [] if batch.decoder is None else [batch.decoder]
    log_probs = []
    for ids, mask, positions, targets, *decoder in zip(*(t.split(REFERENCE_ROWS) for t in tensors), strict=True):
        more = {"decoder_input_ids": decoder[0]} if decoder else {}
        out = model(input_ids=ids, attention_mask=mask, **more)
        if hasattr(out, "logits"):  # those of classes are one vector a row
            logits = scored(out.logits, positions) if out.logits.dim() == 3 else out.logits[:, None]
        else:
            logits = getattr(model.get_base_model(), LINEAR_HEAD)(scored(out.last_hidden_state, positions))
        log_probs.append(logits.double().log_softmax(-1).gather(-1, targets).cpu())
    return torch.cat(log_probs)


def another_function(adapter: str, why: str) -> UserError:
    """The error for an adapter whose scores here are not those that it has where PEFT reads it by itself.

    Args:
        adapter: its directory.
        why: what was compared.
    """
    return UserError(f"adapter {adapter}: it is another function where PEFT loads it: {why}")


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Meanwhile a 16-bit model computes in float32, by the same weights: each module's are widened while it runs."""

    def widen(module: nn.Module, args: tuple) -> tuple:
        saved.append([(p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()])
        for p, data in saved[-1]:
            p.data = data.float()
        return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)

    def narrow(module: nn.Module, args: tuple, output: object) -> None:
        for p, data in saved.pop():
            p.data = data

    saved: list[list[tuple[nn.Parameter, torch.Tensor]]] = []
    casting = [m for m in model.modules() if getattr(m, "cast_input_dtype_enabled", False)]  # adapters of PEFT
    hooks = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    for layer in casting:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in casting:
            layer.cast_input_dtype_enabled = True
        for p, data in (pair for pairs in saved for pair in pairs):  # a forward pass that failed
            p.data = data


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
