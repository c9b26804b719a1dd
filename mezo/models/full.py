"""A model whose every parameter is trained: read from a checkpoint, and written as one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from mezo.config import Model
from mezo.errors import UserError
from mezo.models.load import load_base, load_tokenizer, weights_hash
from mezo.models.spec import Attached

SCRATCH = ".mezo-model-"  # begins the names of folders that a model is written in before it takes its place


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
        raise UserError(
            f"--model {model}: other weights than the run started from (SHA-256 in {dtype}): restore them; if nothing"
            " was changed, the checkpoint lacks some, which are drawn anew at each load: use a whole one"
        )
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
    directory.parent.mkdir(parents=True, exist_ok=True)
    if (directory.parent / "trajectory.jsonl").is_file():  # a run, this process's alone: left by a killed one
        for left in directory.parent.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory.parent) as scratch:
        part = Path(scratch) / "part"
        with _without_bars(), _valid_generation_config(model):
            model.save_pretrained(part)
        load_tokenizer(source).save_pretrained(part)
        for path in part.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        part.rename(directory)


@contextmanager
def _valid_generation_config(model: nn.Module) -> Iterator[None]:
    """transformers writes no settings of sampling for a model that does not sample, as some published ones have them.

    They are not trained and not read here: what is written then samples, so that the settings mean what they say.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    sampling = own.do_sample
    try:
        own.validate(strict=True)
    except ValueError:
        own.do_sample = True
    try:
        yield
    finally:
        own.do_sample = sampling


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


def with_own_parameters(model: Model, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Attached:
    """Every parameter of the base under its own name; a tied one is one parameter, under the first of its names."""
    params = dict(base.named_parameters())
    for name, p in params.items():
        if p.dtype != base.dtype or not p.is_floating_point():
            raise UserError(
                f"--tuning full: {model.base} holds {name} in {p.dtype}, the rest in {base.dtype}; use a model of"
                " one plain dtype, or --dtype float32"
            )
    return base, params, None
