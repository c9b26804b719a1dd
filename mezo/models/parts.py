"""A model ready to be scored: the base taken apart, with what is trained of it attached."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mezo.config import Model
from mezo.models import full, lora, lora_b, lora_xs, prefix
from mezo.models.attention import Prefix
from mezo.models.families import Family, why_kv_depends
from mezo.models.head import add_linear_head, check_encoder, is_encoder, some_logits, trained_whole
from mezo.models.load import Checkpoint, base_hash, code_hash, load_with_new
from mezo.models.spec import LINEAR_HEAD, TrainedSpec
from mezo.models.tuning import Attached, Base
from mezo.progress import say

TUNINGS = {
    "lora": lora.attach,
    "lora-b": lora_b.attach,
    "lora-xs": lora_xs.attach,
    "full": full.attach,
    "prefix": prefix.attach,
}
"""What --tuning names: from its options and a `Base`, an `Attached`."""


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that scoring needs.

    Args:
        attached: the model with what is trained of it, in eval mode, no parameter requiring grad.
        family: of the model.
        base: the model of transformers within: its forward pass is what is right.
        body: the transformer without its head; of a model that reads images too, its part for text.
        layers: its layers; empty where it has no list of them, one module a layer.
        head: hidden states -> logits; it may be adapted as well. None where it is no single module.
        causal: True for a decoder, False for an encoder or both of them.
        encoder_decoder: one transformer reads the prompt, another writes the answer.
        first: number of the lowest layer that must be run: the lowest trained one, or the last.
        kv_depends: why keys and values depend on what is trained, None if none does.
        scored_by: the head, as `--head` names it; under "linear" the base has none of its own.
    """

    attached: Attached
    family: Family
    base: nn.Module
    body: nn.Module
    layers: Sequence[nn.Module]
    head: nn.Module | None
    causal: bool
    encoder_decoder: bool
    first: int
    kv_depends: str | None
    scored_by: str

    @property
    def model(self) -> nn.Module:
        """What is run: the PEFT model, or the base where that is trained."""
        return self.attached.model

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Trained parameters by canonical name."""
        return self.attached.params

    @property
    def prefix(self) -> Prefix | None:
        """What every layer's own keys and values follow, if anything."""
        return self.attached.prefix

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the prefix, 0 without one."""
        return self.prefix.tokens if self.prefix else 0

    @property
    def window(self) -> int | None:
        """How many tokens back the last layer attends, None for all. There are layers."""
        return self.family.window(self.body.config, len(self.layers) - 1)

    @property
    def position_limit(self) -> int | None:
        """Tokens that a row may have, None for any number."""
        limit = getattr(self.body.config, "max_position_embeddings", None)
        if limit is None:
            return None
        return limit - self.family.first_position(self.body.config) - self.prefix_tokens

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits of every token, (..., vocabulary), at hidden states (..., hidden_size)."""
        return self._scaled(self.head(hidden).float())

    def some_logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """`logits` of some tokens alone, ids (tokens,); None where the head is no linear layer."""
        logits = some_logits(self.head, hidden, tokens)
        return None if logits is None else self._scaled(logits)

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of the logits of its own head; those of classes stay as they are."""
        return self.family.logits(logits, self.body.config) if self.scored_by == "model" else logits


def load_parts(
    model: Model, device: torch.device, dtype: torch.dtype, classes: int = 0, checkpoint: Checkpoint | None = None
) -> tuple[ModelParts, TrainedSpec]:
    """Load the base model, attach what is trained of it, fresh, and describe that.

    Under `head` "linear" the base is the bare encoder with a linear layer of its own beside its layers.

    Args:
        model: the base, and what is trained of it.
        device: where it is put.
        dtype: of the base.
        classes: outputs of a head for classes.
        checkpoint: of the model, if its configuration has been read.
    Raises:
        UserError: the model cannot be loaded, or has no such layers or modules, or cannot be trained so.
    """
    checkpoint = checkpoint or Checkpoint.of(model.base, model.tuning.head, model.quantization, model.trust_remote_code)
    base, sha256 = _load(checkpoint, device, dtype, classes)
    attached = TUNINGS[model.tuning.name](model.tuning, base)
    attached.model.requires_grad_(False)
    params, family, n_layers, config = attached.params, base.checkpoint.family, len(base.layers), base.body.config
    below = [name for name in params if name not in attached.above]
    parts = ModelParts(
        attached,
        family,
        base.model,
        base.body,
        base.layers,
        _head_in_use(base),
        causal=not (base.checkpoint.masked or base.checkpoint.encoder_decoder or (base.whole and is_encoder(config))),
        encoder_decoder=base.checkpoint.encoder_decoder,
        first=0 if attached.prefix else _lowest_trained(base, attached),
        kv_depends=why_kv_depends(below, n_layers, family) if n_layers else "the model has no list of its layers",
        scored_by=base.checkpoint.head,
    )
    shapes, frozen = ({name: tuple(p.shape) for name, p in part.items()} for part in (params, attached.frozen))
    name, quantization, dtype_name = checkpoint.name, checkpoint.quantization, str(dtype).split(".")[1]
    code = code_hash(base.model)
    return parts, TrainedSpec(attached.peft, shapes, name, sha256, dtype_name, frozen, quantization, code)


def _lowest_trained(base: Base, attached: Attached) -> int:
    """Number of the lowest layer that depends on what is trained; the last one where that is the head alone."""
    in_layers = [set(map(id, layer.parameters())) for layer in base.layers]
    trained = {id(p) for name, p in attached.params.items() if name not in attached.above}
    below = trained.intersection(map(id, base.body.parameters())).difference(*in_layers)  # embeddings, say
    if below or not in_layers:
        return 0
    return next((i for i, layer in enumerate(in_layers) if layer & trained), len(in_layers) - 1)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, classes: int) -> tuple[Base, str]:
    """A base model and the hash of its weights; with a head of so many classes, where it has one."""
    model, new = load_with_new(checkpoint, dtype, classes, device)
    if checkpoint.head == "linear":
        check_encoder(model, checkpoint.name)
    sha256 = base_hash(model, new, checkpoint.head)
    body = model.get_decoder() if checkpoint.reads_images else model.base_model
    whole = trained_whole(model, new) if checkpoint.head == "classification" else ()
    if checkpoint.head == "linear":
        whole = (add_linear_head(model, classes),)
    elif new:
        say(f"a new head of {classes} classes ({', '.join(whole)}), which the checkpoint lacks")
    layers = None  # of an encoder and a decoder there are two lists
    if not checkpoint.encoder_decoder:
        layers = checkpoint.family.layers_of(body, body.config.num_hidden_layers)
    return Base(checkpoint, model, body, layers or (), _head_of(checkpoint, model, body), whole, new), sha256


def _head_of(checkpoint: Checkpoint, model: nn.Module, body: nn.Module) -> nn.Module | None:
    """What is called with the body's hidden states, and gives logits; None if that is no single module."""
    if checkpoint.head != "model":
        head = getattr(model, LINEAR_HEAD, None)  # a decoder's has that name too; an encoder's reads a whole text
        return head if checkpoint.head == "linear" or isinstance(head, nn.Linear) else None
    if checkpoint.reads_images:
        return model.get_output_embeddings()
    others = [child for child in model.children() if child is not body]
    return others[0] if len(others) == 1 and body is not model else None


def _head_in_use(base: Base) -> nn.Module | None:
    """The head after something was attached: an adapted one is another module."""
    if base.whole:
        return base.head and getattr(base.model, LINEAR_HEAD).modules_to_save["default"]
    return _head_of(base.checkpoint, base.model, base.body)
