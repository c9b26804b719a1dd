"""A model whose every parameter is trained: read from a checkpoint, and written as one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from mezo.errors import UserError
from mezo.runtimes.peft_model import load_base, load_tokenizer, weights_hash


def read_parameters(model: str, dtype: str, sha256: str = "") -> dict[str, torch.Tensor]:
    """Parameters of a checkpoint by the model's own names, tied ones once, on the CPU.

    Args:
        model: path or hub id.
        dtype: of the result, e.g. "bfloat16".
        sha256: what `weights_hash` must give; empty is not checked.
    Raises:
        UserError: the model cannot be loaded, or is another.
    """
    base = load_base(model, getattr(torch, dtype))
    if sha256 and weights_hash(base) != sha256:
        raise UserError(f"--model {model}: other weights than the run started from (SHA-256 in {dtype}); restore them")
    return {name: p.detach() for name, p in base.named_parameters()}


def write_parameters(theta: dict[str, torch.Tensor], model: str, dtype: str, directory: Path) -> None:
    """Write a model as `model` is, but with theta, rounded once to dtype, for its parameters; see `save_model`."""
    base = load_base(model, getattr(torch, dtype))
    for name, p in base.named_parameters():
        p.data = theta[name].to(p.dtype)
    save_model(base, model, directory)


def save_model(model: nn.Module, source: str, directory: Path) -> None:
    """Write a model and its tokenizer as `from_pretrained` takes them, whole or not at all.

    Args:
        model: of transformers.
        source: path or hub id whose tokenizer is written beside it.
        directory: created; a model that is there already gives way once the new one is on the disk.
    """
    part, old = (directory.with_name(directory.name + end) for end in (".part", ".old"))
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    with _without_bars():
        model.save_pretrained(part)
    load_tokenizer(source).save_pretrained(part)
    for path in part.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The progress bars of transformers would mix with the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
