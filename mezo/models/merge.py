"""A model to hand on: an adapter merged into its base model, or a trained model in another dtype."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from mezo.errors import UserError
from mezo.models.full import save_model
from mezo.models.load import Checkpoint, load_base, quantising_device
from mezo.models.quantization import dequantise, is_quantised
from mezo.models.spec import NONE


def merge(
    model: str,
    adapter: Path,
    output_dir: Path,
    dtype: str = "auto",
    head: str = "model",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    quantization: str = NONE,
    quantised_in: str = "float32",
    trusted: bool = False,
) -> None:
    """Write base + (lora_alpha / r) B A as a transformers model: added in float32 and cast once.

    Args:
        model: base model, path or hub id.
        adapter: PEFT adapter directory.
        output_dir: directory to create.
        dtype: of the result; auto is that of the base checkpoint.
        head: of the model, "model" or "classification".
        shapes: of the adapter's tensors by canonical name, which say how many classes there are.
        quantization: what the adapter's base was quantised to: the result has what these weights mean, as floats.
        quantised_in: dtype of all else of that base, which scales are rounded to.
        trusted: code that the base brings is run.
    """
    checkpoint = Checkpoint.of(model, head, quantization, trusted)
    loaded = torch.float32 if quantization == NONE else getattr(torch, quantised_in)
    base = load_base(checkpoint, loaded, device=quantising_device(quantization))
    if is_quantised(base):
        base = dequantise(base).cpu()
    plain = dataclasses.replace(checkpoint, quantization=NONE)
    wanted = load_base(plain, "auto").dtype if dtype == "auto" else getattr(torch, dtype)
    own = {f"base_model.model.{name}": tuple(p.shape) for name, p in base.named_parameters()}
    others = {shape[0] for name, shape in (shapes or {}).items() if name in own and own[name] != shape}
    if others:  # the head of the base has other classes
        base = load_base(checkpoint, torch.float32, min(others))
    merged = _untied(PeftModel.from_pretrained(base, str(adapter))).merge_and_unload()
    save_model(merged.to(wanted), model, output_dir, trusted)


def cast(model: Path, base: str, output_dir: Path, dtype: str = "auto") -> None:
    """Write a trained model in another dtype, cast once.

    Args:
        model: its directory.
        base: path or hub id of the model it was trained from.
        output_dir: directory to create.
        dtype: of the result; auto is that of the base checkpoint.
    """
    try:
        wanted = load_base(Checkpoint.of(base), "auto").dtype if dtype == "auto" else getattr(torch, dtype)
    except UserError as error:
        raise UserError(f"{error}; it is needed for its dtype alone: give --dtype instead") from error
    save_model(load_base(Checkpoint.of(str(model)), wanted), str(model), output_dir)


def _untied(model: PeftModel) -> PeftModel:
    """The model with a head of its own if the head is adapted: what is added to it is not the embeddings'."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if isinstance(head, LoraLayer) and base.config.tie_word_embeddings:
        layer = head.get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
        base.all_tied_weights_keys = {}
    return model
