"""A base model from transformers with what is trained of it: a PEFT adapter, LoRA or prefix, or its own parameters."""

from dataclasses import dataclass

import torch
from torch import nn

from mezo.config import Model
from mezo.errors import UserError
from mezo.models.families import KV_FREE, adapted_leaves, attention_window, layers_of
from mezo.models.full import with_own_parameters
from mezo.models.head import LINEAR_HEAD, add_linear_head, check_encoder
from mezo.models.load import is_masked, load_base, weights_hash
from mezo.models.lora import with_lora
from mezo.models.prefix import PROMPT, Prefix, with_prefix
from mezo.models.spec import TrainedSpec


@dataclass
class ModelParts:
    """The parts of a model that scoring needs.

    Args:
        model: the PEFT model, or the base where that is trained; in eval mode, no parameter requiring grad.
        body: the transformer without its head.
        layers: its layers.
        head: hidden states -> logits; it may be adapted as well.
        params: trained parameters by canonical name.
        causal: True for a decoder, False for an encoder.
        first: index of the lowest layer that must be run: the lowest trained one, or the last.
        kv_free: no key or value depends on what is trained.
        window: how far back the last layer attends, or None.
        prefix: what every layer's own keys and values follow, or None.
    """

    model: nn.Module
    body: nn.Module
    layers: nn.ModuleList
    head: nn.Module
    params: dict[str, nn.Parameter]
    causal: bool
    first: int
    kv_free: bool
    window: int | None
    prefix: Prefix | None = None


def load_parts(
    model: Model, device: torch.device, dtype: torch.dtype, classes: int = 0
) -> tuple[ModelParts, TrainedSpec]:
    """Load the base model, attach a fresh adapter unless its own parameters are trained, and describe what is.

    Under `head` "linear" the base is the bare encoder with a linear layer of that name beside its layers.

    Args:
        model: the base, and what is trained of it.
        device: where it is put.
        dtype: of the base.
        classes: outputs of a linear head.
    Raises:
        UserError: the model cannot be loaded, or has no such layers or modules, or cannot be trained so.
    """
    linear = model.tuning.head == "linear"
    causal = not linear and not is_masked(model.base)
    base = load_base(model.base, dtype, bare=linear).to(device)
    if linear:
        check_encoder(base, model)
        base.pooler = None  # not read, and drawn anew at each load where the checkpoint has none
    weights, body = weights_hash(base), base.base_model
    if linear:
        add_linear_head(base, classes)
    heads = [getattr(base, LINEAR_HEAD)] if linear else [child for child in base.children() if child is not body]
    layers = layers_of(body, base.config.num_hidden_layers)
    if len(heads) != 1 or layers is None:
        raise UserError(f"--model {model.base}: {type(base).__name__} is not one body of layers and one head")
    attach = {"lora": with_lora, "full": with_own_parameters, "prefix": with_prefix}[model.tuning.name]
    trained, params, peft = attach(model, base, layers, heads[0])
    trained.requires_grad_(False)
    if linear:
        head = getattr(base, LINEAR_HEAD).modules_to_save["default"]
    else:
        head = next(child for child in base.children() if child is not body)  # an adapted one is another module
    ids = set(map(id, params.values()))
    touched = [i for i, layer in enumerate(layers) if not ids.isdisjoint(map(id, layer.parameters()))]
    last = len(layers) - 1
    prefix = Prefix(params[PROMPT], len(layers), peft["num_attention_heads"]) if PROMPT in params else None
    every = peft is None or prefix is not None
    kv_free = not every and set(touched) <= {last} and adapted_leaves(layers[-1]) <= KV_FREE
    first = 0 if prefix else min(touched, default=last)
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    spec = TrainedSpec(peft, shapes, model.base, weights, str(dtype).split(".")[1])
    window = attention_window(base.config)
    return ModelParts(trained, body, layers, head, params, causal, first, kv_free, window, prefix), spec


def position_limit(parts: ModelParts) -> int | None:
    """Tokens that a row may have, None for any number: RoBERTa counts positions from its padding id on."""
    limit = getattr(parts.body.config, "max_position_embeddings", None)
    if limit is None:
        return None
    table = getattr(getattr(parts.body, "embeddings", None), "position_embeddings", None)
    first = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1
    return limit - first - (parts.prefix.tokens if parts.prefix else 0)
