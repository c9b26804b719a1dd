"""Base models and tokenizers from transformers."""

import hashlib

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from mezo.errors import UserError
from mezo.models.attention import ATTENTION


def load_tokenizer(model: str):
    """The tokenizer of a model directory or hub id."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: no tokenizer could be loaded ({first_line(error)})") from error


def is_masked(model: str) -> bool:
    """True if a model fills masks, False if it continues text; read from its config."""
    try:
        architectures = AutoConfig.from_pretrained(model).architectures
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: it could not be loaded ({first_line(error)})") from error
    return (architectures or [""])[0].endswith("ForMaskedLM")


def load_base(model: str, dtype: torch.dtype | str, bare: bool = False) -> nn.Module:
    """A model with its head, or `bare`, on the CPU in eval mode. Raises UserError if it cannot be loaded."""
    auto = AutoModel if bare else AutoModelForMaskedLM if is_masked(model) else AutoModelForCausalLM
    try:
        return auto.from_pretrained(model, dtype=dtype, attn_implementation=ATTENTION).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: it could not be loaded ({first_line(error)})") from error


def weights_hash(base: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the base weights, tied ones once."""
    digest = hashlib.sha256()
    for name, p in base.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
