"""Prefix tuning: keys and values of a few tokens in front of every layer's own (Li and Liang 2021, arXiv 2101.00190).

They are trained as they lie in a key-value cache, rotary embedding included, without a network that makes them; as in
MeZO (arXiv 2305.17333, appendix E.5) they start as those of real tokens. What runs is the model's own code with a
filled cache, as PEFT runs it; the text's positions follow on from the prefix.
"""

import inspect
from dataclasses import dataclass

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from mezo.config import Model
from mezo.errors import UserError
from mezo.models.load import is_masked
from mezo.models.spec import Attached
from mezo_kernels.philox import check_seed, philox_4x32

PROMPT = "prompt_embeddings"
"""Name of the trained tensor, which PEFT's files give it."""


VOCABULARY = 0x766F6361  # "voca": the stream word of the counter that draws tokens


ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that keep keys and values


@dataclass(frozen=True)
class Prefix:
    """The trained keys and values.

    Args:
        weight: (tokens, layers * 2 * heads * head_dim): for each layer the keys of all heads, then the values.
        layers: of the model.
        heads: of keys and values.
    """

    weight: nn.Parameter
    layers: int
    heads: int

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.weight)

    def cache(self, rows: int) -> DynamicCache:
        """A new key-value cache for a batch of so many rows that begins with the prefix; gradients flow to it."""
        parts = self.weight.view(self.tokens, 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)
        parts = parts[:, None].expand(-1, rows, -1, -1, -1).unbind(0)
        return DynamicCache(zip(parts[::2], parts[1::2], strict=True))

    def inputs(self, rows: int, mask: torch.Tensor | None = None) -> dict:
        """Arguments of a forward pass behind the prefix; `mask`, (rows, length), says where there are tokens."""
        if mask is not None:
            mask = nn.functional.pad(mask, (self.tokens, 0), value=1)
        return {"past_key_values": self.cache(rows), "attention_mask": mask}


def vocabulary_tokens(n: int, vocabulary: int, run_seed: int) -> list[int]:
    """Token ids that a prefix starts from: word 0 of the Philox blocks (0, ..., n - 1) under key run_seed.

    Args:
        n: tokens of the prefix.
        vocabulary: size of the vocabulary; every id is as likely.
        run_seed: 0 <= run_seed < 2**64.

    >>> vocabulary_tokens(5, 50265, run_seed=0) == vocabulary_tokens(7, 50265, run_seed=0)[:5]
    True
    """
    key = check_seed(run_seed) & 0xFFFFFFFF, run_seed >> 32
    return [philox_4x32(i, 0, 0, VOCABULARY, *key)[0] % vocabulary for i in range(n)]


@torch.no_grad()
def real_activations(body: nn.Module, ids: list[int]) -> torch.Tensor:
    """Keys and values of a sequence in every layer of a transformer, as `Prefix.weight`, float32 on the CPU.

    Raises:
        UserError: the layers of the model do not all keep keys and values of one shape.
    """
    parts = [part.squeeze(0).transpose(0, 1) for part in _keys_and_values(body, ids)]
    return torch.stack(parts, 1).reshape(len(ids), -1).float().cpu()


def attach_prefix(
    base: nn.Module, body: nn.Module, n_layers: int, tokens: int, model: str, causal: bool
) -> tuple[nn.Module, nn.Parameter, dict]:
    """A PEFT model of a base with a prefix of zeros.

    Args:
        base: model with its head.
        body: its transformer.
        n_layers: layers of that.
        tokens: of the prefix.
        model: path or hub id, for the fields.
        causal: True for a decoder. An encoder is PEFT's "feature extraction" whatever its head.

    Returns:
        The PEFT model, its trained parameter, and the fields of adapter_config.json.

    Raises:
        UserError: the model has no place for a prefix.
    """
    parts = _keys_and_values(body, [0])
    if len(parts) != 2 * n_layers:
        raise UserError(_unfit(body, f"{len(parts) // 2} of its {n_layers} layers keep keys and values"))
    _, heads, _, head_dim = parts[0].shape
    fields = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        "base_model_name_or_path": model,
        "num_virtual_tokens": tokens,
        "num_layers": n_layers,
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "encoder_hidden_size": heads * head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "inference_mode": True,
    }
    adapted = get_peft_model(base, PrefixTuningConfig(**fields, init_weights="zero"), autocast_adapter_dtype=False)
    weight = adapted.prompt_encoder["default"].embedding.weight
    weight.data = weight.data.to(base.dtype)
    return adapted.eval(), weight, fields


@torch.no_grad()
def _keys_and_values(body: nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """Keys and values of each layer in turn, (1, heads, len(ids), head_dim), checked to be of one shape."""
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        raise UserError(_unfit(body, "it takes no keys and values"))
    others = sorted(set(getattr(body.config, "layer_types", None) or ()) - ATTENTIONS)
    if others:
        raise UserError(_unfit(body, f"it has layers of {others[0]}"))
    cache = DynamicCache()
    body(input_ids=torch.tensor([ids], device=body.device), past_key_values=cache)
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    shapes = {tuple(part.shape) if part is not None else None for part in parts}
    if len(shapes) != 1 or len(shapes.pop() or ()) != 4:
        raise UserError(_unfit(body, "its layers do not keep keys and values of one shape"))
    return parts


def _unfit(body: nn.Module, why: str) -> str:
    return f"--tuning prefix: {type(body).__name__} has no place for a prefix, {why}; use --tuning lora"


def with_prefix(model: Model, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Attached:
    tokens, causal = model.tuning.num_prefix_tokens, not is_masked(model.base)
    adapted, weight, fields = attach_prefix(base, base.base_model, len(layers), tokens, model.base, causal)
    return adapted, {PROMPT: weight}, fields
