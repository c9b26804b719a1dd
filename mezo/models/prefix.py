"""Prefix tuning: keys and values of a few tokens in front of every layer's own (Li and Liang 2021, arXiv 2101.00190).

They are trained as they lie in a key-value cache, rotary embedding included, without a network that makes them; as in
MeZO (arXiv 2305.17333, appendix E.5) they start as those of real tokens. What runs is the model's own code with a
filled cache, as PEFT runs it; the text's positions follow on from the prefix.
"""

from collections.abc import Collection

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from mezo.config import Prefix as PrefixOptions
from mezo.errors import UserError
from mezo.models.attention import Prefix, cache_argument
from mezo.models.tuning import Attached, Base
from mezo_kernels.philox import check_seed, philox_4x32

PROMPT = "prompt_embeddings"
"""Name of the trained tensor, which PEFT's files give it."""
VOCABULARY = 0x766F6361  # "voca": the stream word of the counter that draws tokens


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


def attach(tuning: PrefixOptions, base: Base) -> Attached:
    """The base with a prefix of zeros in front of every layer's own keys and values, as PEFT runs one.

    Raises:
        UserError: the model has no place for a prefix.
    """
    tokens, body, n_layers = tuning.num_prefix_tokens, base.body, len(base.layers)
    if not base.layers:
        raise _unfit(body, "it has no list of its layers")
    _check_layers(body, base.checkpoint.family.attentions)
    parts = _keys_and_values(body, [0])
    if len(parts) != 2 * n_layers:
        raise _unfit(body, f"{len(parts) // 2} of its {n_layers} layers keep keys and values")
    _, heads, _, head_dim = parts[0].shape
    peft = {
        "peft_type": "PREFIX_TUNING",
        # an encoder is PEFT's "feature extraction" whatever its head
        "task_type": "FEATURE_EXTRACTION" if base.checkpoint.masked else "CAUSAL_LM",
        "base_model_name_or_path": base.checkpoint.name,
        "num_virtual_tokens": tokens,
        "num_layers": n_layers,
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "encoder_hidden_size": heads * head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "inference_mode": True,
    }
    prefix_config = PrefixTuningConfig(**peft, init_weights="zero")
    model = get_peft_model(base.model, prefix_config, autocast_adapter_dtype=False).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data = weight.data.to(base.model.dtype)

    def real_tokens(seed: int) -> dict[str, torch.Tensor]:
        return {PROMPT: real_activations(body, vocabulary_tokens(tokens, body.config.vocab_size, seed))}

    return Attached(
        model,
        {PROMPT: weight},
        peft,
        title=f"parameters of a prefix of {tokens} tokens",
        noise=lambda theta, seed: iter(real_tokens(seed).values()),
        initial=real_tokens,
        prefix=Prefix(weight, n_layers, heads, cache_argument(body)),
    )


def _check_layers(body: nn.Module, attentions: Collection[str]) -> None:
    """Raise UserError if a transformer takes no keys and values, or has layers of other kinds than these."""
    if not cache_argument(body):
        raise _unfit(body, "it takes no keys and values")
    others = sorted(set(getattr(body.config, "layer_types", None) or ()) - set(attentions))
    if others:
        raise _unfit(body, f"it has layers of {others[0]}")


@torch.no_grad()
def _keys_and_values(body: nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """Keys and values of each layer in turn, (1, heads, len(ids), head_dim), checked to be of one shape."""
    cache = DynamicCache()
    body(input_ids=torch.tensor([ids], device=body.device), **{cache_argument(body): cache})
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    shapes = {tuple(part.shape) if part is not None else None for part in parts}
    if len(shapes) != 1 or len(shapes.pop() or ()) != 4:
        raise _unfit(body, "its layers do not keep keys and values of one shape")
    return parts


def _unfit(body: nn.Module, why: str) -> UserError:
    return UserError(f"--tuning prefix: {type(body).__name__} has no place for a prefix, {why}; use --tuning lora")
