"""A model whose every parameter is trained: read from a checkpoint, and written as one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from mezo.atomic import replacing
from mezo.config import Full
from mezo.errors import UserError
from mezo.models.load import Checkpoint, code_hash, load_base, load_tokenizer, weights_hash
from mezo.models.tuning import Attached, Base
from mezo_kernels import ParamLayout, perturb_

NOISE = 1e-3  # standard deviation of what is added for the proof at the start of a run


def read_parameters(model: str, dtype: str, sha256: str = "") -> dict[str, torch.Tensor]:
    """Parameters of a checkpoint by the model's own names, tied ones once, on the CPU.

    Args:
        model: path or hub id.
        dtype: of the result, e.g. "bfloat16".
        sha256: what `weights_hash` must give; empty is not checked.
    Raises:
        UserError: the model cannot be loaded, or is another.
    """
    base = load_base(Checkpoint.of(model), getattr(torch, dtype))
    if sha256 and weights_hash(base) != sha256:
        raise UserError(
            f"--model {model}: other weights than the run started from (SHA-256 in {dtype}): restore them; if nothing"
            " was changed, the checkpoint lacks some, which are drawn anew at each load: use a whole one"
        )
    return {name: p.detach() for name, p in base.named_parameters()}


def write_parameters(theta: dict[str, torch.Tensor], model: str, dtype: str, directory: Path) -> None:
    """Write a model as another one is, but with theta, rounded once, for its parameters; see `save_model`.

    Args:
        theta: float32 by canonical name, on the CPU.
        model: path or hub id of the other one.
        dtype: of what is written, e.g. "bfloat16".
        directory: created.
    """
    base = load_base(Checkpoint.of(model), getattr(torch, dtype))
    for name, p in base.named_parameters():
        if name in theta:  # all of them, but where a trainer left some as they were
            p.data = theta[name].to(p.dtype)
    save_model(base, model, directory)


def save_model(model: nn.Module, source: str, directory: Path, trusted: bool = False) -> None:
    """Write a model and its tokenizer as `from_pretrained` takes them, whole or not at all.

    Args:
        model: of transformers.
        source: path or hub id whose tokenizer is written beside it.
        directory: created; a model that is there already gives way once the new one is on the disk.
        trusted: code that the tokenizer brings is run.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory, old=True) as part:
        with _without_bars(), _valid_generation_config(model):
            model.save_pretrained(part)
        load_tokenizer(source, trusted).save_pretrained(part)


@contextmanager
def _valid_generation_config(model: nn.Module) -> Iterator[None]:
    """transformers writes no settings of sampling for a model that does not sample, as some published ones have them.

    They are not trained and not read here: what is written then samples, so that the settings mean what they say.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        yield
        return
    sampling = settings.do_sample
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
    try:
        yield
    finally:
        settings.do_sample = sampling


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


def attach(tuning: Full, base: Base) -> Attached:
    """The base itself: every parameter under its own name; a tied one is one parameter, under the first of its names.

    Raises:
        UserError: the parameters are not of one dtype, or some are for images, which no text reaches.
    """
    if base.checkpoint.quantised:
        how = base.checkpoint.quantised
        why = f"it is quantised ({how}), and a step changes weights by less than they are rounded to"
        raise UserError(f"--tuning full: {base.checkpoint.name}: {why}; use --tuning lora")
    if code_hash(base.model):
        why = "it comes with code of its own, without which what a run leaves could not be loaded"
        raise UserError(f"--tuning full: {base.checkpoint.name}: {why}; use --tuning lora")
    if base.checkpoint.reads_images:
        why = "it has layers for images, which text would move at random"
        raise UserError(f"--tuning full: {base.checkpoint.name}: {why}; use --tuning lora")
    params, dtype = dict(base.model.named_parameters()), base.model.dtype
    for name, p in params.items():
        if p.dtype != dtype or not p.is_floating_point():
            raise UserError(
                f"--tuning full: {base.checkpoint.name} holds {name} in {p.dtype}, the rest in {dtype}; use a model of"
                " one plain dtype, or --dtype float32"
            )
    return Attached(base.model, params, None, "parameters, all of the model's", _noise)


def _noise(theta: Mapping[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    for name, tensor in theta.items():
        yield perturb_(ParamLayout({name: tensor.float().clone()}), NOISE, seed).tensors[0]
