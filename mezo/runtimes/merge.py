"""An adapter merged into its base model."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mezo.errors import UserError
from mezo.runtimes.peft_model import is_masked, load_tokenizer


def merge(model: str, adapter: Path, output_dir: Path, dtype: str = "auto") -> None:
    """Write base + (lora_alpha / r) B A as a transformers model: added in float32 and cast once.

    Args:
        model: base model, path or hub id.
        adapter: PEFT adapter directory.
        output_dir: directory to create.
        dtype: of the result; auto is that of the base checkpoint.
    """
    auto = AutoModelForMaskedLM if is_masked(model) else AutoModelForCausalLM
    try:
        base = auto.from_pretrained(model, dtype=torch.float32)
        wanted = auto.from_pretrained(model, dtype="auto").dtype if dtype == "auto" else getattr(torch, dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: it could not be loaded ({str(error).splitlines()[0]})") from error
    merged = _untied(PeftModel.from_pretrained(base, str(adapter))).merge_and_unload()
    part = output_dir.with_name(output_dir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    merged.to(wanted).save_pretrained(part)
    load_tokenizer(model).save_pretrained(part)
    part.rename(output_dir)


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
