"""Heads for classes: a linear one beside an encoder, and that of transformers; and logits of some tokens alone."""

from collections.abc import Collection

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig

from mezo.errors import UserError
from mezo.models.spec import LINEAR_HEAD


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration sees what comes after a token too."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def check_encoder(base: nn.Module, model: str) -> None:
    """Raise UserError unless a loaded model, of this path or hub id, is an encoder that a linear head can read."""
    if not is_encoder(base.config):
        raise UserError(f"--head linear: {model} is a {type(base).__name__}, not an encoder; use one, or --head model")


def add_linear_head(base: nn.Module, classes: int) -> str:
    """A linear layer without bias, for the mean of an encoder's last hidden states; returns its name."""
    head = nn.Linear(base.config.hidden_size, classes, bias=False, dtype=base.dtype)
    setattr(base, LINEAR_HEAD, head.to(base.device))
    return LINEAR_HEAD


def trained_whole(base: nn.Module, new: Collection[str]) -> tuple[str, ...]:
    """Names of the modules of a classifier that are trained whole, as PEFT's `modules_to_save` has them.

    They are all beside the transformer, as in PEFT, and a pooler that the checkpoint lacks.

    Args:
        base: a model with a classification head.
        new: names of its parameters that the checkpoint lacks.
    """
    beside = [n for n, part in base.named_children() if part is not base.base_model and [*part.parameters()]]
    pooler = ["pooler"] if any("pooler" in name.split(".") for name in new) else []
    return tuple(dict.fromkeys([*beside, *pooler]))  # a deberta's pooler is beside its transformer


def module_named(model: nn.Module, name: str) -> nn.Module:
    """The module whose path ends with a name."""
    return next(module for path, module in model.named_modules() if path.split(".")[-1] == name)


def some_logits(head: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits of some tokens alone, of a head that is a linear layer, adapted or not; None of another head.

    Args:
        head: of the model.
        hidden: (..., hidden_size), of the model's dtype.
        tokens: (tokens,) int64, token ids.
    Returns:
        (..., tokens) float32 whatever the model's dtype: 16-bit logits near 20 come in steps of an eighth.
    """
    adapted = isinstance(head, LoraLayer)
    base = head.get_base_layer() if adapted else head
    if type(base) is not nn.Linear:
        return None
    hidden, bias = hidden.float(), None if base.bias is None else base.bias[tokens].float()
    logits = nn.functional.linear(hidden, base.weight[tokens].float(), bias)
    if adapted:
        a, b = (weights["default"].weight for weights in (head.lora_A, head.lora_B))
        low = nn.functional.linear(hidden, a.float())
        logits += head.scaling["default"] * nn.functional.linear(low, b[tokens].float())
    return logits
